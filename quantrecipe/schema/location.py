"""Where the files of a source lie: on this machine, or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from io import RawIOBase
from pathlib import PurePath
from typing import Literal, Protocol, Self


class FileStatus(Protocol):
    """What is known of a file or folder without opening it; as ``os.stat_result``."""

    @property
    def st_mode(self) -> int:
        """What it is."""

    @property
    def st_size(self) -> int:
        """Its size in bytes."""

    @property
    def st_mtime_ns(self) -> int:
        """When it was last written to; 0 where files do not change."""


class Location(Protocol):
    """A file or folder of a source: a ``Path``, or what has as much of one for files elsewhere.

    Equal locations are the same file; they can be keys, and travel between processes. What cannot
    be looked up or opened raises what it does for a ``Path``, or an error of this package.
    """

    @property
    def name(self) -> str:
        """The last segment."""

    @property
    def suffix(self) -> str:
        """The end of ``name``, from its last dot on."""

    @property
    def parent(self) -> Self:
        """The folder that it is in; the root is its own."""

    def __truediv__(self, key: str, /) -> Self:
        """A location below it."""

    def __lt__(self, other: Self, /) -> bool:
        """In the order of their segments."""

    def __hash__(self) -> int: ...

    def joinpath(self, *segments: str) -> Self:
        """A location below it."""

    def relative_to(self, other: Self, /) -> PurePath:
        """The path from ``other`` to it.

        Raises:
            ValueError: it is not below ``other``.
        """

    def exists(self) -> bool:
        """Whether there is anything."""

    def is_file(self) -> bool:
        """Whether it is a file."""

    def is_dir(self) -> bool:
        """Whether it is a folder."""

    def is_symlink(self) -> bool:
        """Whether it stands for another place."""

    def iterdir(self) -> Iterator[Self]:
        """What is in a folder."""

    def glob(self, pattern: str, /) -> Iterator[Self]:
        """What matches a pattern below it."""

    def samefile(self, other: Self, /) -> bool:
        """Whether both stand for one file."""

    def stat(self) -> FileStatus:
        """What is known of it."""

    def open(self, mode: Literal["rb"], buffering: Literal[0]) -> RawIOBase:
        """Open a file for reading."""

    def read_bytes(self) -> bytes:
        """All of a file."""
