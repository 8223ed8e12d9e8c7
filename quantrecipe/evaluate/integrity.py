"""The files of a converted checkpoint, held to their lock; every byte is read once."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from threading import Lock as Turn

from quantrecipe.checkpoint import SourceError, digests
from quantrecipe.checkpoint.containers import read_any_header_bytes
from quantrecipe.checkpoint.folder import INDEX_SUFFIX, SUFFIXES
from quantrecipe.evaluate.locked import AGAIN, is_below
from quantrecipe.evaluate.records import Progress
from quantrecipe.evaluate.sidecars import check_sidecars, shard_indexes
from quantrecipe.schema.lock import Lock, LockedTensor, OutputFile
from quantrecipe.schema.plan_metadata import METADATA_KEY, recipe_metadata
from quantrecipe.schema.problems import InvalidInput, Problem, closest
from quantrecipe.schema.tensors import SourceFileInfo, TensorInfo


class _Stopped(Exception):  # noqa: N818 - nothing went wrong here
    """Raised in a file that is being read when nobody wants to know any more."""


def check_files(folder: Path, lock: Lock, *, quick: bool, progress: Progress) -> list[Problem]:
    """Hold every file of a converted checkpoint to its lock.

    Args:
        folder: what the lock lies in.
        lock: what it says.
        quick: headers, sizes and small files only.
        progress: told of every block, from any thread, but never from two at a time.

    Raises:
        SourceError: a file is there and cannot be read.
    """
    tensors: dict[str, dict[str, LockedTensor]] = {output.path: {} for output in lock.outputs}
    for _, tensor in lock.tensors():
        tensors.setdefault(tensor.file, {})[tensor.name] = tensor
    says = recipe_metadata(lock.recipe, lock.recipe_sha256)[METADATA_KEY]
    reading = _Reading(progress)
    files = [
        _OutputCheck(
            folder.joinpath(*output.path.split("/")),
            output,
            tensors[output.path],
            says,
            lock.recipe_sha256,
            quick,
            reading,
        )
        for output in lock.outputs
        if is_below(output.path)
    ]
    problems: list[Problem] = []
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="quantrecipe")
    try:
        # The largest first, so that no core is left alone with one at the end.
        largest = sorted(files, key=lambda file: -file.output.bytes)
        running = {file.output.path: pool.submit(file.run) for file in largest}
        for file in files:
            problems += running[file.output.path].result()
    finally:
        reading.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    problems += check_sidecars(folder, lock)
    problems += _check_extra(folder, lock)
    return problems


@dataclass(frozen=True, slots=True)
class _Reading:
    """What the threads that read files share."""

    progress: Progress
    stop: Event = field(default_factory=Event)
    turn: Turn = field(default_factory=Turn)

    def check(self) -> None:
        """Raises ``_Stopped`` if the work is to end."""
        if self.stop.is_set():
            raise _Stopped

    def done(self, count: int, name: str) -> None:
        """``count`` more bytes of a file have been hashed."""
        with self.turn:
            self.progress(count, name)


@dataclass(frozen=True, slots=True)
class _OutputCheck:
    """One output file, and what the lock says of it."""

    path: Path
    output: OutputFile
    tensors: Mapping[str, LockedTensor]
    metadata: str
    recipe_sha256: str
    quick: bool
    reading: _Reading

    def run(self) -> list[Problem]:
        try:
            status = self.path.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return [self._problem("missing-file", "the lock vouches for it", AGAIN)]
        except OSError as error:
            raise SourceError(self.path, error) from error
        problems: list[Problem] = []
        head = bytearray()
        try:
            header, head = read_any_header_bytes(self.path)
        except InvalidInput as error:
            problems += error.problems
        else:
            problems += self._check_header(header)
        if not stat.S_ISREG(status.st_mode):
            return problems
        if status.st_size != self.output.bytes:
            message = f"has {status.st_size:,} bytes, not {self.output.bytes:,}"
            problems.append(self._problem("wrong-size", message, AGAIN))
        if not self.quick:
            problems += self._check_digests(status.st_size, head)
        return problems

    def _check_header(self, header: SourceFileInfo) -> Iterator[Problem]:
        for tensor in self.tensors.values():
            yield from self._check_tensor(tensor, header)
        for name in header.tensors.keys() - self.tensors.keys():
            yield self._problem("extra-tensor", "the lock does not know it", None, name)
        said = header.metadata.get(METADATA_KEY)
        if said != self.metadata:
            yield self._problem("metadata-mismatch", self._what_metadata(said), AGAIN)

    def _check_tensor(self, tensor: LockedTensor, header: SourceFileInfo) -> Iterator[Problem]:
        info: TensorInfo | None = header.tensors.get(tensor.name)
        if info is None:
            near = closest(tensor.name, header.tensors)
            hint = f"There is {near!r}." if near is not None else AGAIN
            yield self._problem("missing-tensor", "the lock vouches for it", hint, tensor.name)
            return
        for kind, found, wanted in (
            ("mistyped-tensor", info.dtype, tensor.dtype),
            ("misshaped-tensor", list(info.shape), list(tensor.shape)),
            ("misplaced-tensor", f"at byte {info.offset}", f"at byte {tensor.offset}"),
            ("missized-tensor", f"{info.nbytes} bytes", f"{tensor.bytes} bytes"),
        ):
            if found != wanted:
                message = f"is {found}, and the lock says {wanted}"
                yield self._problem(kind, message, None, tensor.name)

    def _what_metadata(self, said: str | None) -> str:
        entry = f"its metadata entry {METADATA_KEY!r}"
        if said is None:
            return f"{entry} is missing"
        try:
            digest = json.loads(said)["recipe_sha256"]
        except (ValueError, KeyError, TypeError):
            return f"{entry} holds no recipe with a digest"
        if digest != self.recipe_sha256:
            return f"{entry} is of another recipe than the lock ({digest})"
        return f"{entry} is not what its recipe makes it"

    def _check_digests(self, size: int, head: bytearray) -> Iterator[Problem]:
        ranges = dict(_readable(self.tensors.values(), size))
        try:
            whole, each = digests(
                self.path,
                ranges,
                head=head,
                progress=lambda count: self.reading.done(count, self.output.path),
                check=self.reading.check,
            )
        except ValueError:  # it was as long as that a moment ago
            yield self._problem("source-changed", "became shorter while it was read", AGAIN)
            return
        damaged = [name for name, digest in each.items() if digest != self.tensors[name].xxh3_128]
        for name in damaged:
            yield self._problem("digest-mismatch", "its bytes are not those written", AGAIN, name)
        if whole != self.output.sha256:
            message = (
                f"its bytes are not those written: {len(damaged)} tensor(s) differ"
                if damaged
                else "no tensor differs, so its header does, or the digest in the lock"
            )
            yield self._problem("digest-mismatch", message, AGAIN)

    def _problem(
        self, kind: str, message: str, hint: str | None, tensor: str | None = None
    ) -> Problem:
        return Problem(kind, message, hint, file=str(self.path), tensor=tensor)


def _readable(tensors: Iterable[LockedTensor], size: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The ranges that can be hashed in one pass; what is wrong with the others has been said."""
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.bytes)):
        end = tensor.offset + tensor.bytes
        if position <= tensor.offset and end <= size:
            yield tensor.name, (tensor.offset, tensor.bytes)
            position = end


def _check_extra(folder: Path, lock: Lock) -> Iterator[Problem]:
    """Whoever opens the folder would take other weights in it for a part of the checkpoint."""
    known = {output.path for output in lock.outputs} | shard_indexes(lock).keys()
    known.update(lock.recipe.statistics())
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            relative = Path(parent, name).relative_to(folder).as_posix()
            if name.endswith((*SUFFIXES, INDEX_SUFFIX)) and relative not in known:
                yield Problem(
                    "extra-file",
                    "the lock does not know it",
                    "Move it elsewhere, or fetch the lock that goes with it.",
                    file=str(Path(parent, name)),
                )
