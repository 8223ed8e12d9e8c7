"""SHA-256 of files and of the tensors in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Final

from quantrecipe.checkpoint.errors import SourceError

BLOCK: Final = 1 << 20


def file_sha256(path: Path, block: int = BLOCK) -> str:
    """The SHA-256 of a file, as 64 hex digits, read in blocks of ``block`` bytes.

    Raises:
        SourceError: the file cannot be read.
    """
    return digests(path, {}, block)[0]


def digests(
    path: Path, ranges: Mapping[str, tuple[int, int]], block: int = BLOCK
) -> tuple[str, dict[str, str]]:
    """The SHA-256 of a file and of ranges in it, in one pass over its bytes.

    Args:
        path: the file.
        ranges: by name, ``(offset, nbytes)`` from the start of the file; they must not overlap.
        block: the most bytes held at a time.

    Raises:
        SourceError: the file cannot be read.
        ValueError: two ranges overlap, or one reaches beyond the end of the file.
    """
    whole = hashlib.sha256()
    parts: dict[str, str] = {}
    view = memoryview(bytearray(block))
    try:
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as helper:
            position = 0
            for name, (offset, nbytes) in sorted(ranges.items(), key=lambda item: item[1]):
                if offset < position:
                    raise ValueError(f"{name!r} overlaps the range before it")
                part = hashlib.sha256()
                gap = offset - position
                passed = _feed(file, view, gap, whole)
                if passed + _feed(file, view, nbytes, whole, part, helper) != gap + nbytes:
                    raise ValueError(f"{name!r} reaches beyond the end of {path}")
                position = offset + nbytes
                parts[name] = part.hexdigest()
            while _feed(file, view, block, whole):
                pass
    except OSError as error:
        raise SourceError(path, error) from error
    return whole.hexdigest(), parts


def _feed(
    file: FileIO,
    view: memoryview,
    count: int,
    whole: hashlib._Hash,
    part: hashlib._Hash | None = None,
    helper: Executor | None = None,
) -> int:
    """Give the next ``count`` bytes of a file to the hashes; returns how many there were."""
    done = 0
    while done < count:
        got = file.readinto(view[: count - done])
        if not got:
            break
        # Hashing lets other threads run, so that two hashes take hardly longer than one.
        pending = helper.submit(part.update, view[:got]) if part and helper else None
        whole.update(view[:got])
        if pending is not None:
            pending.result()
        done += got
    return done
