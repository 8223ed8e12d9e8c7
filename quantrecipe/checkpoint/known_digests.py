"""What is known of a file's SHA-256 from whoever made or fetched it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantrecipe.schema.lock import LOCK_NAME

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class KnownDigest:
    """A digest, and who says so.

    Attributes:
        sha256: 64 hex digits.
        origin: for people.
    """

    sha256: str
    origin: str


def known_sha256(path: Path, relative: str) -> KnownDigest | None:
    """What is known of a file, without reading it.

    From the name of the blob that it is a link to in the Hub's cache, from what the Hub's client
    noted beside a download into a folder, or from the lock of a conversion that wrote it.

    Args:
        path: the file.
        relative: its path below the source's root, with ``/``.
    """
    return _of_blob(path) or _of_download(path, relative) or _of_lock(path, relative)


def _of_blob(path: Path) -> KnownDigest | None:
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
        return KnownDigest(target.name, "the cache of the Hub")
    return None


def _of_download(path: Path, relative: str) -> KnownDigest | None:
    for root, below in _roots(path, relative):
        note = root / ".cache" / "huggingface" / "download" / f"{below}.metadata"
        try:
            _, etag, *_ = note.read_text("utf-8").splitlines()
        except (OSError, ValueError):
            continue
        if _SHA256.fullmatch(etag.strip()):
            return KnownDigest(etag.strip(), str(note))
    return None


def _of_lock(path: Path, relative: str) -> KnownDigest | None:
    for root, below in _roots(path, relative):
        lock = root / LOCK_NAME
        try:
            outputs = json.loads(lock.read_text("utf-8"))["outputs"]
            found = {output["path"]: output["sha256"] for output in outputs}.get(below)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(found, str) and _SHA256.fullmatch(found):
            return KnownDigest(found, str(lock))
    return None


def _roots(path: Path, relative: str) -> list[tuple[Path, str]]:
    """Folders that a file may have been put below as a whole, and its path there."""
    parts = relative.split("/")
    found = [(path.parents[len(parts) - 1], relative)]
    if len(parts) > 1:
        found.append((path.parent, parts[-1]))
    return found
