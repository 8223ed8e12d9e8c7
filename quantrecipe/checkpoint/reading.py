"""Reading ranges of source tensors into buffers that the caller owns and reuses."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any, Final

from quantrecipe.checkpoint.closing import Closing
from quantrecipe.checkpoint.errors import SourceError, source_changed
from quantrecipe.checkpoint.hub.client import Check, unchecked
from quantrecipe.checkpoint.hub.ranges import Range
from quantrecipe.checkpoint.hub.read_ahead import ReadAhead
from quantrecipe.checkpoint.hub.repository import HubPath
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.tensors import SourceFileInfo, TensorInfo

WritableBuffer = Any
"""A contiguous writable buffer: ``bytearray``, ``memoryview``, NumPy array."""

MAX_OPEN: Final = 32


class _Opened(ABC):
    """A file that can be read from.

    Attributes:
        users: who reads from it right now.
    """

    def __init__(self) -> None:
        self.users = 0

    @abstractmethod
    def read(self, view: memoryview, offset: int) -> int:
        """Put bytes from ``offset`` on into ``view``; how many, 0 at the end of the file."""

    @abstractmethod
    def announce(self, offset: int, nbytes: int) -> None:
        """Have bytes fetched that will be read soon, where somebody listens."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""


class _Local(_Opened):
    """Positional reads where the system has them, else one reader at a time."""

    def __init__(self, file: FileIO) -> None:
        super().__init__()
        self.file = file
        self._seeking = Lock()

    def read(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [view], offset)
        with self._seeking:
            self.file.seek(offset)
            return self.file.readinto(view) or 0

    def announce(self, offset: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file.fileno(), offset, nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        self.file.close()


class _Remote(_Opened):
    """Ranges of a file in a repository."""

    def __init__(self, ahead: ReadAhead, path: HubPath, check: Check) -> None:
        super().__init__()
        self._ahead, self._path, self._check = ahead, path, check

    def read(self, view: memoryview, offset: int) -> int:
        self._ahead.read(self._path, offset, view, self._check)
        return len(view)

    def announce(self, offset: int, nbytes: int) -> None:
        """What is read was said by ``SourceReader.expect``."""

    def close(self) -> None:
        """There is nothing to close."""


class SourceReader(Closing):
    """Reads bytes of tensors, from any number of threads, through a bounded number of open files.

    Every file is held against its size and modification time in the headers that were read before,
    each time it is opened.

    Files of a repository are fetched range by range; see ``ReadAhead``.

    Args:
        files: the files that will be read.
        max_open: how many of them are kept open when nobody reads them.
        check: called while a network keeps a reader waiting; what it raises ends the wait.
    """

    def __init__(
        self,
        files: Iterable[SourceFileInfo],
        max_open: int = MAX_OPEN,
        check: Check = unchecked,
    ) -> None:
        self._expected = {file.path: file for file in files}
        self._max_open = max(1, max_open)
        self._check = check
        self._open: OrderedDict[Location, _Opened] = OrderedDict()
        self._lock = Lock()
        self._closed = False
        remote = any(isinstance(path, HubPath) for path in self._expected)
        self._ahead = ReadAhead() if remote else None

    def close(self) -> None:
        """Close every file; reads that follow are errors."""
        with self._lock:
            self._closed = True
            for opened in self._open.values():
                opened.close()
            self._open.clear()
        if self._ahead is not None:
            self._ahead.close()

    def expect(self, ranges: Iterable[tuple[TensorInfo, int, int]]) -> None:
        """Say what will be read, before anything is; at most once.

        What comes over a network is fetched ahead by that, in few requests.

        Args:
            ranges: tensors, each with the first byte and how many there are, in order of use.
        """
        if self._ahead is not None:
            self._ahead.expect(
                Range(one.file, start, stop)
                for given in ranges
                for one, start, stop in _places(*given)
                if isinstance(one.file, HubPath)
            )

    def read_into(self, info: TensorInfo, start: int, buffer: WritableBuffer) -> None:
        """Fill ``buffer`` with the bytes of a tensor from byte ``start`` on.

        Args:
            info: the tensor, as a header described it.
            start: in bytes, from the tensor's first.
            buffer: is filled whole, whatever its element type.

        Raises:
            InvalidInput: kind ``source-changed``: the file is gone, or no longer what it was.
            SourceError: the system could not read it.
            ValueError: the range does not lie in the tensor, or the file is none of this reader's.
        """
        with memoryview(buffer) as given:
            if given.nbytes == 0 and 0 <= start <= info.nbytes:
                return
            with given.cast("B") as view:
                if start < 0 or start + len(view) > info.nbytes:
                    raise ValueError(
                        f"{info.name}: bytes {start} to {start + len(view)} of {info.nbytes}"
                    )
                self._read(info, start, view)

    def announce(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Have the system fetch bytes of a tensor that will be read soon, where it listens.

        It finds out by itself that a file is read from front to back, but not where several threads
        read at several places. What is wrong with the file is told by ``read_into``.
        """
        if not nbytes:
            return
        for piece, first, _, size in _pieces(info, start, nbytes):
            self.announce(piece, first, size)
        if info.pieces or info.times > 1:
            return
        with suppress(InvalidInput, SourceError, OSError), self._borrow(info) as opened:
            opened.announce(info.offset + start, nbytes)

    def _read(self, info: TensorInfo, start: int, view: memoryview) -> None:
        if info.pieces:
            for piece, first, done, size in _pieces(info, start, len(view)):
                with view[done : done + size] as part:
                    self._read(piece, first, part)
        elif info.times > 1:
            # What is repeated is a scale, and fits in anywhere.
            once = bytearray(info.nbytes // info.times)
            with memoryview(once) as whole, self._borrow(info) as opened:
                self._fill(opened, info, 0, whole)
            skipped = start % len(once)
            repeated = once * (-(-(skipped + len(view)) // len(once)))
            view[:] = repeated[skipped : skipped + len(view)]
        else:
            with self._borrow(info) as opened:
                self._fill(opened, info, start, view)

    def _fill(self, opened: _Opened, info: TensorInfo, start: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            with view[done:] as rest:
                try:
                    got = opened.read(rest, info.offset + start + done)
                except OSError as error:
                    raise SourceError(info.file, error, info.name) from error
            if got == 0:
                raise source_changed(info.file, "became shorter while it was read", info.name)
            done += got

    @contextmanager
    def _borrow(self, info: TensorInfo) -> Iterator[_Opened]:
        with self._lock:
            if self._closed:
                raise ValueError("the reader is closed")
            opened = self._open.get(info.file)
            if opened is None:
                opened = self._open[info.file] = self._open_file(info)
            self._open.move_to_end(info.file)
            opened.users += 1
            self._evict()
        try:
            yield opened
        finally:
            with self._lock:
                opened.users -= 1

    def _evict(self) -> None:
        if len(self._open) <= self._max_open:
            return
        for path in list(self._open):
            if len(self._open) <= self._max_open:
                return
            if self._open[path].users == 0:
                self._open.pop(path).close()

    def _open_file(self, info: TensorInfo) -> _Opened:
        path = info.file
        expected = self._expected.get(path)
        if expected is None:
            raise ValueError(f"{path} is not a file of this reader")
        if isinstance(path, HubPath):
            assert self._ahead is not None
            return _Remote(self._ahead, path, self._check)
        assert isinstance(path, Path)
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise source_changed(path, "is gone", info.name) from None
        except OSError as error:
            raise SourceError(path, error, info.name) from error
        try:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (expected.size, expected.mtime_ns):
                raise source_changed(path, _difference(status, expected), info.name)
            _announce(file)
        except BaseException:
            file.close()
            raise
        return _Local(file)


def _pieces(
    info: TensorInfo, start: int, nbytes: int
) -> Iterator[tuple[TensorInfo, int, int, int]]:
    """The pieces of a tensor that a range of its bytes lies in.

    Yields:
        Each piece, the first byte of it, how many bytes of the range come before, and how many
        there are of it.
    """
    position = 0
    for piece in info.pieces:
        first, last = max(start, position), min(start + nbytes, position + piece.nbytes)
        if first < last:
            yield piece, first - position, first - start, last - first
        position += piece.nbytes


def _places(info: TensorInfo, start: int, nbytes: int) -> Iterator[tuple[TensorInfo, int, int]]:
    """Where in files a range of a tensor's bytes lies: first bytes and ends."""
    if info.pieces:
        for piece, first, _, size in _pieces(info, start, nbytes):
            yield from _places(piece, first, size)
    elif info.times > 1:
        yield info, info.offset, info.offset + info.nbytes // info.times
    elif nbytes:
        yield info, info.offset + start, info.offset + start + nbytes


def _announce(file: FileIO) -> None:
    """Tell the system that the file will be read from front to back, where it listens."""
    if hasattr(os, "posix_fadvise"):
        try:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ESPIPE):
                raise SourceError(Path(file.name), error) from error


def _difference(status: os.stat_result, expected: SourceFileInfo) -> str:
    if status.st_size != expected.size:
        return f"has {status.st_size:,} bytes, and had {expected.size:,} when it was planned from"
    return "was written to since it was planned from"
