"""Repositories of a Hub that lives in memory: commits, references, blobs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

Json = dict[str, Any]

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".model")
"""What the Hub keeps in large file storage, whatever its size."""


@dataclass(frozen=True)
class Blob:
    """The content of a file: bytes, or a file on this machine that is served as it is."""

    content: bytes | Path
    lfs: bool

    @cached_property
    def size(self) -> int:
        if isinstance(self.content, bytes):
            return len(self.content)
        return self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        with self.content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def git_oid(self) -> str:
        """What git calls it: of a large file, what it calls the pointer to it."""
        data = self.pointer if self.lfs else self.read(0, self.size)
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {self.size}\n"
        ).encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def read(self, start: int, count: int) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[start : start + count]
        with self.content.open("rb") as file:
            file.seek(start)
            return file.read(count)

    def entry(self, path: str) -> Json:
        """How a listing shows it."""
        found: Json = {"type": "file", "oid": self.git_oid, "size": self.size, "path": path}
        if self.lfs:
            found["lfs"] = {
                "oid": self.sha256,
                "size": self.size,
                "pointerSize": len(self.pointer),
            }
        return found


Files = dict[str, Blob]


@dataclass
class Commit:
    """A state of a repository."""

    sha: str
    files: Files
    title: str = ""
    description: str = ""


@dataclass
class HubRepository:
    """A model repository.

    Attributes:
        commits: by SHA, oldest first.
        refs: branches and tags to SHAs.
        private: is not there for whoever has no token.
        gated: its files need a token that is in ``granted``; a text says how it is granted.
        granted: tokens of those who accepted the terms.
    """

    name: str
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool | str = False
    granted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.commit({}, title="initial commit")

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    @property
    def files(self) -> Files:
        """What ``main`` holds."""
        return self.commits[self.refs["main"]].files

    def content(self, path: str) -> bytes:
        """The bytes of a file of ``main``."""
        blob = self.files[path]
        return blob.read(0, blob.size)

    def commit(
        self,
        changes: Mapping[str, Blob | None],
        *,
        branch: str = "main",
        title: str = "",
        description: str = "",
    ) -> str:
        """Add, replace and (``None``) remove files; the SHA of the new commit."""
        parent = self.refs.get(branch)
        files = dict(self.commits[parent].files) if parent is not None else {}
        for path, blob in changes.items():
            if blob is None:
                files.pop(path, None)
            else:
                files[path] = blob
        named = [f"{path} {blob.git_oid}" for path, blob in sorted(files.items())]
        text = "\n".join([self.name, str(parent), title, *named])
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = Commit(sha, files, title, description)
        self.refs[branch] = sha
        return sha

    def tree(self, commit: Commit, below: str, *, recursive: bool) -> list[Json]:
        """A listing, folders included, as the Hub gives it."""
        prefix = f"{below}/" if below else ""
        found: dict[str, Json] = {}
        for path, blob in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            inner = PurePosixPath(path[len(prefix) :])
            for parent in [*inner.parents][-2::-1]:
                if recursive or len(parent.parts) == 1:
                    folder = prefix + parent.as_posix()
                    oid = hashlib.sha1(folder.encode(), usedforsecurity=False).hexdigest()
                    found[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
            if recursive or len(inner.parts) == 1:
                found[path] = blob.entry(path)
        return list(found.values())


def blobs_of(files: Mapping[str, bytes] | Path) -> dict[str, Blob | None]:
    """Blobs of contents by path, or of all files in a folder."""
    contents: Mapping[str, bytes | Path] = (
        {
            path.relative_to(files).as_posix(): path
            for path in sorted(files.rglob("*"))
            if path.is_file()
        }
        if isinstance(files, Path)
        else files
    )
    return {path: Blob(one, path.endswith(LFS_SUFFIXES)) for path, one in contents.items()}


def card_data(files: Files) -> Json | None:
    """The front matter of a model card, as the Hub reads it."""
    if "README.md" not in files:
        return None
    blob = files["README.md"]
    found = re.match(r"---\n(.*?)\n---\n", blob.read(0, blob.size).decode(), re.DOTALL)
    values: Json | None = None if found is None else yaml.safe_load(found[1])
    return values
