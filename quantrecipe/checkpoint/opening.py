"""Opening files whose headers are read, and saying what is wrong with them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import SEEK_END, FileIO, RawIOBase
from typing import Final, Protocol, runtime_checkable

from quantrecipe.checkpoint.errors import SourceError
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import InvalidInput, Problem

_MOST_PROBLEMS: Final = 20


@runtime_checkable
class Announced(Protocol):
    """A file that is better told what will be read of it."""

    def announce(self, ranges: Iterable[tuple[int, int]]) -> None:
        """See ``announce``."""


@contextmanager
def regular_file(path: Location, hint: str) -> Iterator[RawIOBase]:
    """A regular file, open for reading; a symlink to one is fine.

    Args:
        path: the file.
        hint: what to do if it is none.

    Raises:
        InvalidInput: it is missing, or no regular file.
        SourceError: it is there and cannot be read, now or within the block.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise refuse(path, "not-a-file", f"is {what}", hint)
        with path.open("rb", buffering=0) as file:
            yield file
    except (FileNotFoundError, NotADirectoryError):
        gone = "It is a symlink whose target is gone." if path.is_symlink() else None
        raise refuse(path, "missing-file", "there is no such file", gone) from None
    except OSError as error:
        raise SourceError(path, error) from error


def size_and_time(file: RawIOBase) -> tuple[int, int]:
    """The size of an open file, and its modification time; 0 where files do not change.

    Raises:
        OSError: the system does not say.
    """
    if isinstance(file, FileIO):
        status = os.fstat(file.fileno())
        return status.st_size, status.st_mtime_ns
    size = file.seek(0, SEEK_END)
    file.seek(0)
    return size, 0


def announce(file: RawIOBase, ranges: Iterable[tuple[int, int]]) -> None:
    """Tell a file that comes over a network which ranges of it are read next.

    Args:
        file: any other file is left alone.
        ranges: first bytes and ends, from the start of the file.
    """
    if isinstance(file, Announced):
        file.announce(ranges)


def read_exactly(file: RawIOBase, count: int) -> bytearray:
    """``count`` bytes, or fewer if the file ends before."""
    buffer = bytearray(count)
    view = memoryview(buffer)
    done = 0
    while done < count:
        got = file.readinto(view[done:])
        if not got:
            view.release()
            return buffer[:done]
        done += got
    return buffer


def refuse(path: Location, kind: str, message: str, hint: str | None = None) -> InvalidInput:
    """What is wrong with a file, to be raised."""
    return InvalidInput(Problem(kind=kind, message=message, hint=hint, file=str(path)))


def limited(problems: list[Problem], path: Location) -> list[Problem]:
    """The first problems, and how many more there are."""
    more = len(problems) - _MOST_PROBLEMS
    if more <= 0:
        return problems
    rest = Problem(kind="more-problems", message=f"and {more:,} more problems", file=str(path))
    return [*problems[:_MOST_PROBLEMS], rest]
