"""Digests of files and of the tensors in them: SHA-256 of the one, XXH3 of the other."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import xxhash

from quantrecipe.checkpoint.errors import SourceError

BLOCK: Final = 1 << 20
"""Small enough that the second hash finds a block in the cache where the first has left it."""


def xxh3_128(data: bytes | bytearray | memoryview) -> str:
    """The XXH3 of 128 bits and seed 0 that locks hold for tensors, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def file_sha256(path: Path, block: int = BLOCK) -> str:
    """The SHA-256 of a file, as 64 hex digits, read in blocks of ``block`` bytes.

    Raises:
        SourceError: the file cannot be read.
    """
    return digests(path, {}, block)[0]


def digests(
    path: Path,
    ranges: Mapping[str, tuple[int, int]],
    block: int = BLOCK,
    *,
    progress: Callable[[int], None] | None = None,
    check: Callable[[], None] | None = None,
) -> tuple[str, dict[str, str]]:
    """The SHA-256 of a file and the XXH3 of ranges in it, in one pass over its bytes.

    Other threads run meanwhile: several files are best hashed at the same time.

    Args:
        path: the file.
        ranges: by name, ``(offset, nbytes)`` from the start of the file; they must not overlap.
        block: the most bytes held at a time.
        progress: called with the bytes of each block that is done with.
        check: called before each block; what it raises ends the work.

    Returns:
        64 hex digits, and 32 for each name.

    Raises:
        SourceError: the file cannot be read.
        ValueError: two ranges overlap, or one reaches beyond the end of the file.
    """
    spans = _in_order(ranges)
    whole, found = hashlib.sha256(), {}
    view, position = memoryview(bytearray(block)), 0
    try:
        with path.open("rb", buffering=0) as file:
            while True:
                if check is not None:
                    check()
                got = file.readinto(view)
                whole.update(view[:got])
                found.update(_take(spans, view[:got], position))
                position += got
                if not got:
                    break
                if progress is not None:
                    progress(got)
    except OSError as error:
        raise SourceError(path, error) from error
    if spans:
        raise ValueError(f"{spans[0].name!r} reaches beyond the end of {path}")
    return whole.hexdigest(), found


@dataclass(slots=True)
class _Span:
    """A range of a file, and the hash of as much of it as was seen."""

    start: int
    end: int
    name: str
    hash: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)


def _in_order(ranges: Mapping[str, tuple[int, int]]) -> deque[_Span]:
    spans: deque[_Span] = deque()
    for name, (offset, nbytes) in sorted(ranges.items(), key=lambda item: item[1]):
        if offset < (spans[-1].end if spans else 0):
            raise ValueError(f"{name!r} overlaps the range before it")
        spans.append(_Span(offset, offset + nbytes, name))
    return spans


def _take(spans: deque[_Span], block: memoryview, position: int) -> dict[str, str]:
    """Give each span its bytes of a block; those that end in it are taken off, hashed."""
    ended: dict[str, str] = {}
    end = position + len(block)
    while spans and spans[0].start <= end:
        span = spans[0]
        first = max(span.start, position) - position
        span.hash.update(block[first : min(span.end, end) - position])
        if span.end > end:
            break
        ended[span.name] = span.hash.hexdigest()
        spans.popleft()
    return ended
