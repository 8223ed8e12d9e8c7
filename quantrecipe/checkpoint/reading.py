"""Reading ranges of source tensors into buffers that the caller owns and reuses."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Final, Self

from quantrecipe.checkpoint.errors import SourceError, source_changed
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.tensors import SourceFileInfo, TensorInfo

WritableBuffer = Any
"""A contiguous writable buffer: ``bytearray``, ``memoryview``, NumPy array."""

MAX_OPEN: Final = 32


class _OpenFile:
    """An open file; positional reads where the system has them, else one reader at a time."""

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self.users = 0
        self._seeking = Lock()

    def read(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [view], offset)
        with self._seeking:
            self.file.seek(offset)
            return self.file.readinto(view) or 0


class SourceReader:
    """Reads bytes of tensors, from any number of threads, through a bounded number of open files.

    Every file is held against its size and modification time in the headers that were read before,
    each time it is opened.

    Args:
        files: the files that will be read.
        max_open: how many of them are kept open when nobody reads them.
    """

    def __init__(self, files: Iterable[SourceFileInfo], max_open: int = MAX_OPEN) -> None:
        self._expected = {file.path: file for file in files}
        self._max_open = max(1, max_open)
        self._open: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._lock = Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; reads that follow are errors."""
        with self._lock:
            self._closed = True
            for opened in self._open.values():
                opened.file.close()
            self._open.clear()

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
        if not nbytes or not hasattr(os, "posix_fadvise"):
            return
        for piece, first, _, size in _pieces(info, start, nbytes):
            self.announce(piece, first, size)
        if info.pieces or info.times > 1:
            return
        with suppress(InvalidInput, SourceError, OSError), self._borrow(info) as opened:
            place = info.offset + start
            os.posix_fadvise(opened.file.fileno(), place, nbytes, os.POSIX_FADV_WILLNEED)

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

    def _fill(self, opened: _OpenFile, info: TensorInfo, start: int, view: memoryview) -> None:
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
    def _borrow(self, info: TensorInfo) -> Iterator[_OpenFile]:
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
                self._open.pop(path).file.close()

    def _open_file(self, info: TensorInfo) -> _OpenFile:
        path = info.file
        expected = self._expected.get(path)
        if expected is None:
            raise ValueError(f"{path} is not a file of this reader")
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
        return _OpenFile(file)


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
