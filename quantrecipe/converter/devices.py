"""Where blocks are computed: memory on both sides, and moving blocks between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from quantrecipe.converter.buffers import Buffers
from quantrecipe.schema.problems import InvalidInput, Problem

CPU: Final = "cpu"


class Device:
    """One thread's memory for one device, and its own order of work there.

    On the CPU nothing is moved. On a GPU, blocks go through pinned memory on a stream of their
    own, so that what other threads copy, compute, read and write goes on meanwhile.

    Args:
        name: ``cpu``, ``cuda`` or ``cuda:N``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._apart = name != CPU
        self.host = Buffers(pinned=self._apart)
        self.memory = Buffers(name) if self._apart else self.host
        self._stream = torch.cuda.Stream(name) if self._apart else None  # type: ignore[no-untyped-call]

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within it, torch works on this device's own stream."""
        with torch.cuda.stream(self._stream):  # None: nothing changes
            yield

    def take(self, purpose: str, block: Tensor) -> Tensor:
        """A block of the host's buffers, on the device."""
        if not self._apart:
            return block
        there = self.memory.view(purpose, tuple(block.shape), block.dtype)
        return there.copy_(block, non_blocking=True)

    def give(self, purpose: str, *blocks: Tensor) -> list[Tensor]:
        """Blocks of the device, in the host's memory, once all that was asked for is done."""
        if not self._apart:
            return list(blocks)
        here = []
        for number, block in enumerate(blocks):
            kept = self.host.view(f"{purpose} {number}", tuple(block.shape), block.dtype)
            here.append(kept.copy_(block, non_blocking=True))
        assert self._stream is not None
        self._stream.synchronize()
        return here


def check_devices(devices: str, *, here: bool = True) -> tuple[str, ...]:
    """The devices that a user named, with commas between them.

    Args:
        devices: their names.
        here: whether they must be devices of this machine.

    Raises:
        InvalidInput: one is unknown, or is not there.
    """
    names = tuple(name.strip() for name in devices.split(","))
    for name in names:
        message = _unusable(name, here)
        if message is not None:
            hint = "Use cpu, cuda, or cuda:N for each of several, with commas between."
            raise InvalidInput(Problem("no-device", f"device {name!r}: {message}", hint=hint))
    return names


def _unusable(name: str, here: bool) -> str | None:
    if name == CPU:
        return None
    kind, colon, number = name.partition(":")
    if kind != "cuda" or (colon and not number.isdecimal()):
        return "is not known"
    if not here:
        return None
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    count = torch.cuda.device_count()
    return None if int(number or 0) < count else f"there are {count}, counted from 0"
