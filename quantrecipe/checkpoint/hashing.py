"""Digests of files and of the tensors in them: SHA-256 of the one, XXH3 of the other."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import RawIOBase
from typing import Final

import xxhash

from quantrecipe.checkpoint.errors import SourceError
from quantrecipe.checkpoint.opening import size_and_time
from quantrecipe.schema.location import Location

BLOCK: Final = 1 << 20
"""Small enough that the second hash finds a block in the cache where the first has left it."""


def xxh3_128(data: bytes | bytearray | memoryview) -> str:
    """The XXH3 of 128 bits and seed 0 that locks hold for tensors, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def file_sha256(path: Location, block: int = BLOCK) -> str:
    """The SHA-256 of a file, as 64 hex digits, read in blocks of ``block`` bytes.

    Raises:
        SourceError: the file cannot be read.
    """
    return digests(path, {}, block)[0]


def digests(
    path: Location,
    ranges: Mapping[str, tuple[int, int]],
    block: int = BLOCK,
    *,
    head: bytes | bytearray = b"",
    progress: Callable[[int], None] | None = None,
    check: Callable[[], None] | None = None,
) -> tuple[str, dict[str, str]]:
    """The SHA-256 of a file and the XXH3 of ranges in it, in one pass over its bytes.

    Other threads run meanwhile: several files are best hashed at the same time.

    Args:
        path: the file.
        ranges: by name, ``(offset, nbytes)`` from the start of the file; they must not overlap.
        block: the most bytes held at a time.
        head: what the file begins with, where that has been read already; it is not read again.
        progress: called with the bytes of each block that is done with.
        check: called before each block is hashed; what it raises ends the work.

    Returns:
        64 hex digits, and 32 for each name.

    Raises:
        SourceError: the file cannot be read.
        ValueError: two ranges overlap, or one reaches beyond the end of the file.
    """
    spans = _in_order(ranges)
    whole, found, position = hashlib.sha256(), {}, 0
    try:
        with path.open("rb", buffering=0) as file:
            for view in _blocks(file, block, head):
                if check is not None:
                    check()
                whole.update(view)
                found.update(_take(spans, view, position))
                position += len(view)
                if view and progress is not None:
                    progress(len(view))
    except OSError as error:
        raise SourceError(path, error) from error
    if spans:
        raise ValueError(f"{spans[0].name!r} reaches beyond the end of {path}")
    return whole.hexdigest(), found


def _blocks(file: RawIOBase, block: int, head: bytes | bytearray) -> Iterator[memoryview]:
    """The bytes of a file, then none, in a buffer that is used again for each block."""
    if head:
        yield memoryview(head)
    left = size_and_time(file)[0] - len(head)
    file.seek(len(head))
    # Fresh memory costs more than reading into it, and small files are many.
    view = memoryview(bytearray(max(1, min(block, left))))
    while got := file.readinto(view):
        yield view[:got]
    yield view[:0]


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
