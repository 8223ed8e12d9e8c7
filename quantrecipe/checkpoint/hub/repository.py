"""A repository at one commit, and the files in it, as far as they can stand for a ``Path``."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

from quantrecipe.checkpoint.hub.client import HubFile, listing
from quantrecipe.checkpoint.hub.streams import HubStream
from quantrecipe.schema.address import SCHEME


@dataclass(frozen=True, slots=True, order=True)
class Repository:
    """A repository at one commit, so that no two answers are of different ones.

    Attributes:
        name: ``owner/name``.
        commit: its SHA.
        endpoint: which Hub it is on.
    """

    name: str
    commit: str
    endpoint: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}@{self.commit}"


@dataclass(frozen=True, slots=True)
class HubStatus:
    """See ``Location.stat``."""

    st_mode: int
    st_size: int
    st_mtime_ns: int = 0


@dataclass(frozen=True, slots=True, order=True)
class HubPath:
    """A file or folder of a repository: a ``Location``.

    It holds no more than names, and travels between processes; who uses it there asks the Hub with
    the token that is there.

    Attributes:
        repository: at its commit.
        path: below the repository's root.
    """

    repository: Repository
    path: PurePosixPath

    def __str__(self) -> str:
        root = str(self.repository)
        return root if self.path == PurePosixPath() else f"{root}/{self.path}"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def suffix(self) -> str:
        return self.path.suffix

    @property
    def parent(self) -> HubPath:
        return HubPath(self.repository, self.path.parent)

    def __truediv__(self, key: str) -> HubPath:
        return self.joinpath(key)

    def joinpath(self, *segments: str) -> HubPath:
        return HubPath(self.repository, self.path.joinpath(*segments))

    def relative_to(self, other: HubPath) -> PurePosixPath:
        return self.path.relative_to(other.path)

    @property
    def file(self) -> HubFile:
        """What the Hub says of the file.

        Raises:
            FileNotFoundError: it is none.
        """
        found = listing(self.repository).get(str(self.path))
        if found is None:
            raise FileNotFoundError(2, "there is no such file", str(self))
        return found

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return str(self.path) in listing(self.repository)

    def is_dir(self) -> bool:
        return str(self.path) in _folders(self.repository)

    def is_symlink(self) -> bool:
        return False

    def samefile(self, other: HubPath) -> bool:
        return self == other

    def iterdir(self) -> Iterator[HubPath]:
        names = _folders(self.repository).get(str(self.path))
        if names is None:
            raise NotADirectoryError(20, "is no folder", str(self))
        yield from (self / name for name in names)

    def glob(self, pattern: str) -> Iterator[HubPath]:
        """See ``Path.glob``: ``*``, ``?`` and ``[…]`` within a segment, ``**`` for any folders."""
        yield from dict.fromkeys(_matches(self, PurePosixPath(pattern).parts))

    def stat(self) -> HubStatus:
        if self.is_dir():
            return HubStatus(stat.S_IFDIR, 0)
        return HubStatus(stat.S_IFREG, self.file.size)

    def open(self, mode: Literal["rb"] = "rb", buffering: Literal[0] = 0) -> HubStream:
        return HubStream(self)

    def read_bytes(self) -> bytes:
        cached = self.at_hand()
        if cached is not None:
            return cached.read_bytes()
        with self.open() as stream:
            return stream.readall()

    def at_hand(self) -> Path | None:
        """The file in the Hub's cache on this machine, if all of it is there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self.repository.name, str(self.path), revision=self.repository.commit
        )
        return Path(found) if isinstance(found, str) else None


@lru_cache(maxsize=16)
def _folders(repository: Repository) -> Mapping[str, tuple[str, ...]]:
    """What is in each folder, sorted."""
    found: dict[str, set[str]] = {".": set()}
    for text in listing(repository):
        path = PurePosixPath(text)
        while path != PurePosixPath():
            found.setdefault(str(path.parent), set()).add(path.name)
            path = path.parent
    return {folder: tuple(sorted(names)) for folder, names in found.items()}


def _matches(path: HubPath, segments: tuple[str, ...]) -> Iterator[HubPath]:
    first, *rest = segments
    if first == "**":
        if rest:
            yield from _matches(path, tuple(rest))
        else:
            yield path
        for child in path.iterdir():
            if child.is_dir():
                yield from _matches(child, segments)
        return
    for child in path.iterdir():
        if not fnmatchcase(child.name, first):
            continue
        if not rest:
            yield child
        elif child.is_dir():
            yield from _matches(child, tuple(rest))
