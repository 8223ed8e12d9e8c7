"""Hashing beside the work: outputs as soon as they are whole, sources while they are read."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, get_native_id
from typing import Final

from quantrecipe.checkpoint import SourceError, digests, locate
from quantrecipe.checkpoint.closing import Closing
from quantrecipe.checkpoint.errors import source_changed
from quantrecipe.checkpoint.hub.repository import HubPath
from quantrecipe.checkpoint.known_digests import known_sha256
from quantrecipe.converter.resuming import range_digest
from quantrecipe.converter.units import Range, Unit
from quantrecipe.converter.workers import Stopped, available_cores
from quantrecipe.converter.working import UnitResult
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import OutputFile
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.problems import InvalidInput, OutputError, Problem
from quantrecipe.schema.tensors import OutputFilePlan, SourceFileInfo

_CHANGED: Final = "was changed or removed while it was read"


class _Pool(Closing):
    """Threads that hash, and stop when the ``with`` block around them is left."""

    def __init__(
        self, threads: int, name: str, initializer: Callable[[], None] | None = None
    ) -> None:
        self._stop = Event()
        self._pool = ThreadPoolExecutor(
            threads, thread_name_prefix=f"quantrecipe-{name}", initializer=initializer
        )

    def close(self) -> None:
        """Stop hashing, and wait for the threads."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped


class SourceDigests(_Pool):
    """SHA-256 of every file of a source, read once from front to back.

    What is read here first, the workers find in the system's cache, and the other way round, so the
    disk is asked once.

    Args:
        files: the source's files.
        known: digests that an earlier attempt computed, by path.
        done: called with a path and its digest.
    """

    def __init__(
        self,
        files: Sequence[SourceFileInfo],
        known: Mapping[str, str],
        done: Callable[[str, str], None],
    ) -> None:
        # One file after the other, as the work goes; a machine of many cores is ahead of one hash.
        super().__init__(max(1, available_cores() // 4), "sources", _stand_back)
        self._known = dict(known)
        self._done = done
        self._futures = [self._pool.submit(self._hash, file) for file in files]

    def results(self) -> dict[Location, str | None]:
        """All digests, by path; of files of a repository, what the Hub says, if it does.

        Raises:
            InvalidInput: a file is not what whoever published it says it is, or has changed.
            SourceError: a file cannot be read.
        """
        return dict(future.result() for future in self._futures)

    def check(self) -> None:
        """Raise what ``results`` would, as far as that is known by now."""
        for future in self._futures:
            if not future.done():
                return
            future.result()

    def _hash(self, file: SourceFileInfo) -> tuple[Location, str | None]:
        if isinstance(file.path, HubPath):
            # It never passes through here as a whole.
            return file.path, file.path.file.sha256
        assert isinstance(file.path, Path)
        name = str(file.path)
        found = self._known.get(name)
        if found is None:
            try:
                found, _ = digests(file.path, {}, check=self._check)
            except SourceError as error:
                if not file.path.exists():
                    raise source_changed(file.path, _CHANGED) from error
                raise
            status = file.path.stat()
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise source_changed(file.path, _CHANGED)
            self._done(name, found)
        known = known_sha256(file.path, file.relative)
        if known is not None and known.sha256 != found:
            raise InvalidInput(
                Problem(
                    "source-digest",
                    f"its SHA-256 is {found}, and {known.origin} says {known.sha256}",
                    hint="It was damaged or edited; fetch it again.",
                    file=name,
                )
            )
        return file.path, found


class OutputDigests(_Pool):
    """Digests of every output file, each computed from the disk once all of it is written.

    Args:
        plan: what is written.
        units: all of its units.
        folder: the files lie below it.
        threads: how many files to hash at the same time.
    """

    def __init__(self, plan: Plan, units: Sequence[Unit], folder: Path, threads: int) -> None:
        super().__init__(threads, "outputs")
        self._units = units
        self._folder = folder
        self._files = {file.path: file for file in plan.files}
        self._left = Counter(file for unit in units for file in _files_of(unit))
        self._written: dict[tuple[str, str], str] = {}
        self._pieces: list[tuple[Range, str]] = []
        self._futures: dict[str, Future[tuple[OutputFile, dict[str, str]]]] = {}
        for file in plan.files:
            if not self._left[file.path]:
                self._start(file.path)

    def done(self, result: UnitResult) -> frozenset[str]:
        """A unit was written; returns the files that are whole by that."""
        unit = self._units[result.index]
        for role, part in unit.ranges().items():
            if part.whole:
                self._written[part.file, part.tensor] = result.digests[role]
            else:
                self._pieces.append((part, result.digests[role]))
        files = _files_of(unit)
        self._left.subtract(files)
        whole = frozenset(file for file in files if not self._left[file])
        for file in whole:
            self._start(file)
        return whole

    def results(self) -> tuple[tuple[OutputFile, ...], dict[tuple[str, str], str]]:
        """The files, and the digests of tensors by file and name.

        Raises:
            OutputError: what is on the disk is not what was written there.
        """
        files: list[OutputFile] = []
        tensors: dict[tuple[str, str], str] = {}
        for path in self._files:
            output, each = self._futures[path].result()
            files.append(output)
            tensors.update(((path, name), digest) for name, digest in each.items())
        for place, digest in self._written.items():
            if tensors[place] != digest:
                raise self._not_as_written(*place)
        for part, digest in self._pieces:
            if range_digest(self._folder, part) != digest:
                raise self._not_as_written(part.file, part.tensor)
        return tuple(files), tensors

    def _start(self, path: str) -> None:
        self._futures[path] = self._pool.submit(self._hash, self._files[path])

    def _hash(self, file: OutputFilePlan) -> tuple[OutputFile, dict[str, str]]:
        ranges = {name: (file.offsets[name], one.nbytes) for name, one in file.tensors.items()}
        whole, each = digests(locate(self._folder, file.path), ranges, check=self._check)
        return OutputFile(path=file.path, bytes=file.size, sha256=whole), each

    def _not_as_written(self, file: str, tensor: str) -> OutputError:
        return OutputError(
            f"{locate(self._folder, file)} [{tensor}]: what is there is not what was written"
            "\n  Memory, the disk or the network has failed; nothing was published."
        )


def _stand_back() -> None:
    """Let this thread have what the others leave.

    While the disk keeps them waiting, that is plenty; when there is nothing to wait for, its turn
    comes while the last output is hashed on one core.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, get_native_id(), 19)


def _files_of(unit: Unit) -> frozenset[str]:
    return frozenset(part.file for part in unit.ranges().values())
