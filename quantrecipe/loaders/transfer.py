"""Bytes of a checkpoint into tensors on their devices, by several threads.

Tensors on the CPU are read where they will stay. Those on a GPU go through pinned memory, two
stretches a thread, so that a thread reads one while the other is copied.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final

import torch
import xxhash
from torch import Tensor

from quantrecipe.formats.memory import as_memory
from quantrecipe.loaders.checkpoint import Checkpoint, damaged
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.tensors import TensorInfo

PIECE: Final = 8 << 20
"""The most bytes that are read at a time: a multiple of every dtype's size."""

_MOST_THREADS: Final = 8
_AHEAD: Final = 2 * _MOST_THREADS


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor to be read.

    Attributes:
        info: as it is stored.
        device: where it goes; nothing is read for the meta device.
        dtype: what it becomes there.
        stored: what its bytes are numbers of; headers have other words for some.
        shape: what it has there.
    """

    info: TensorInfo
    device: torch.device
    dtype: torch.dtype
    stored: torch.dtype
    shape: tuple[int, ...]


def read_tensors(
    checkpoint: Checkpoint, wanted: Sequence[Wanted]
) -> tuple[list[Tensor], list[Problem]]:
    """Read tensors onto their devices, in the order that they have on the disk.

    Returns:
        the tensors in the order of ``wanted``, and what their bytes have wrong: digests that
        differ, and numbers too large for the dtype asked for.

    Raises:
        InvalidInput: the files have changed.
        SourceError: the system could not read them.
    """
    transfer = _Transfer(checkpoint, wanted)
    try:
        return transfer.run()
    finally:
        transfer.close()


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of a tensor that one thread carries over."""

    wanted: Wanted
    out: Tensor
    start: int
    stop: int


class _Transfer:
    def __init__(self, checkpoint: Checkpoint, wanted: Sequence[Wanted]) -> None:
        self._checkpoint = checkpoint
        self._wanted = wanted
        self._lanes: list[_Lane] = []
        self._own = threading.local()
        self._stopped = threading.Event()
        self._piece = min(PIECE, max((each.info.nbytes for each in wanted), default=0))
        self._before = {
            device: torch.cuda.current_stream(device).record_event()
            for device in {each.device for each in wanted}
            if device.type == "cuda"
        }

    def run(self) -> tuple[list[Tensor], list[Problem]]:
        order = sorted(
            range(len(self._wanted)),
            key=lambda index: (self._wanted[index].info.file, self._wanted[index].info.offset),
        )
        found: dict[int, Tensor] = {}
        spans: list[_Span] = []
        with ThreadPoolExecutor(
            min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="quantrecipe"
        ) as pool:
            running: list[Future[list[Problem]]] = []
            try:
                for index in order:
                    wanted = self._wanted[index]
                    # Here, and so on the caller's stream: it will use them, and free them.
                    found[index] = torch.empty(
                        wanted.shape, dtype=wanted.dtype, device=wanted.device
                    )
                    for span in self._spans(wanted, found[index]):
                        spans.append(span)
                        running.append(pool.submit(self._carry, spans, len(spans) - 1))
                wait(running, return_when=FIRST_EXCEPTION)
                problems = [problem for each in running for problem in each.result()]
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        problems += [problem for lane in self._lanes for problem in lane.finish()]
        return [found[index] for index in range(len(self._wanted))], problems

    def close(self) -> None:
        """Wait for copies that are under way: what they copy from or to may be freed then."""
        for lane in self._lanes:
            lane.wait()

    def _spans(self, wanted: Wanted, out: Tensor) -> list[_Span]:
        size = wanted.info.nbytes
        if wanted.device.type == "meta" or not size:
            return []
        # A digest is of the whole tensor, from front to back.
        step = size if self._checkpoint.digest(wanted.info) is not None else PIECE
        return [
            _Span(wanted, out, start, min(size, start + step)) for start in range(0, size, step)
        ]

    def _carry(self, spans: list[_Span], number: int) -> list[Problem]:
        if number + _AHEAD < len(spans):
            ahead = spans[number + _AHEAD]
            self._checkpoint.announce(ahead.wanted.info, ahead.start, ahead.stop - ahead.start)
        lane: _Lane | None = getattr(self._own, "lane", None)
        if lane is None:
            lane = self._own.lane = _Lane(self._piece, self._before)
            self._lanes.append(lane)
        span = spans[number]
        info = span.wanted.info
        expected = self._checkpoint.digest(info)
        seen = xxhash.xxh3_128() if expected is not None else None
        for start in range(span.start, span.stop, PIECE):
            if self._stopped.is_set():
                return []
            piece = lane.memory(span, start, min(span.stop, start + PIECE))
            memory = as_memory(piece)
            self._checkpoint.read_into(info, start, memory)
            if seen is not None:
                seen.update(memory)
            lane.move(span, start, piece)
        if seen is not None and seen.hexdigest() != expected:
            return [damaged(info)]
        return []


class _Lane:
    """One thread's memory, and its streams on the GPUs that it copies to."""

    def __init__(self, size: int, before: dict[torch.device, torch.cuda.Event]) -> None:
        self._before = before
        self._size = size
        self._pinned: list[Tensor] = []
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._scratch: dict[torch.device, Tensor] = {}
        self._lost: list[tuple[Wanted, Tensor]] = []

    def memory(self, span: _Span, start: int, stop: int) -> Tensor:
        """Where bytes ``start`` to ``stop`` of a tensor are to be read to."""
        if span.wanted.device.type == "cpu" and span.wanted.dtype == span.wanted.stored:
            return _bytes(span.out)[start:stop]
        if not self._pinned:
            self._pinned = [
                torch.empty(self._size, dtype=torch.uint8, pin_memory=bool(self._before))
                for _ in range(2 if self._before else 1)
            ]
        self._turn = (self._turn + 1) % len(self._pinned)
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._pinned[self._turn][: stop - start]

    def move(self, span: _Span, start: int, piece: Tensor) -> None:
        """Bring what was read from byte ``start`` on to where it belongs."""
        wanted = span.wanted
        if wanted.device.type == "cuda":
            with torch.cuda.stream(self._stream(wanted.device)):
                self._move(span, start, piece)
                self._copied[self._turn] = torch.cuda.current_stream().record_event()
        elif wanted.device.type != "cpu" or wanted.dtype != wanted.stored:
            self._move(span, start, piece)

    def _move(self, span: _Span, start: int, piece: Tensor) -> None:
        wanted, apart = span.wanted, span.wanted.device.type == "cuda"
        if wanted.dtype == wanted.stored:
            _bytes(span.out)[start : start + len(piece)].copy_(piece, non_blocking=apart)
            return
        if wanted.device.type != "cpu":
            piece = self._there(wanted.device)[: len(piece)].copy_(piece, non_blocking=apart)
        values = piece.view(wanted.stored)
        first = start // wanted.stored.itemsize
        result = span.out.reshape(-1)[first : first + len(values)].copy_(values)
        if torch.finfo(wanted.dtype).max < torch.finfo(wanted.stored).max:
            lost = torch.isfinite(values).logical_and_(~torch.isfinite(result)).any()
            self._lost.append((wanted, lost))

    def _there(self, device: torch.device) -> Tensor:
        if device not in self._scratch:
            self._scratch[device] = torch.empty(self._size, dtype=torch.uint8, device=device)
        return self._scratch[device]

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            made = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # What was there before may still be in use by work under way.
            made.wait_event(self._before[device])
            self._streams[device] = made
        return self._streams[device]

    def wait(self) -> None:
        """Until every copy is done."""
        for stream in self._streams.values():
            stream.synchronize()

    def finish(self) -> list[Problem]:
        """The tensors that did not fit the dtype asked for."""
        self.wait()
        return [
            Problem(
                "out-of-range",
                f"holds a number that is too large for {str(wanted.dtype)[6:]}",
                hint="Ask for a dtype with more range, or leave dtype= out.",
                file=str(wanted.info.file),
                tensor=wanted.info.name,
            )
            for wanted in {id(each): each for each, lost in self._lost if bool(lost)}.values()
        ]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
