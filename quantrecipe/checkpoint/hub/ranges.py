"""Which requests to send for which ranges. Pure: nothing here knows of a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

File = TypeVar("File")

REQUEST_BYTES: Final = 16 << 20
"""The most bytes of one request: a lost connection costs no more, and several share a file."""

WINDOW_BYTES: Final = 64 << 20
"""Ranges that are needed within so many bytes of each other may share a request."""

WASTE: Final = 0.005
"""The most bytes of a request between ranges, for each byte of them."""


@dataclass(frozen=True, slots=True)
class Range(Generic[File]):
    """Bytes of a file, from ``start`` up to ``stop``."""

    file: File
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Request(Generic[File]):
    """Bytes of a file to be asked for at once.

    Attributes:
        needed: how many of them were asked for; the others lie between ranges.
    """

    file: File
    start: int
    stop: int
    needed: int


def requests_for(
    ranges: Iterable[Range[File]],
    *,
    request_bytes: int = REQUEST_BYTES,
    window_bytes: int = WINDOW_BYTES,
    waste: float = WASTE,
) -> Iterator[Request[File]]:
    """Requests that bring all of some ranges.

    No byte is asked for twice, whatever ranges overlap. Ranges that are needed soon after each
    other and lie close to each other share a request, as long as what lies between them is less
    than ``waste`` of what they are.

    Args:
        ranges: in the order in which they are needed; those without bytes are left out.
        request_bytes: the most bytes of a request.
        window_bytes: ranges are looked at in groups of about so many bytes.
        waste: between 0 and 1.

    Yields:
        Requests in the order in which they are needed, none of which overlap.
    """
    taken: dict[File, _Intervals] = {}
    window: list[Range[File]] = []
    size = 0
    for one in ranges:
        known = taken.setdefault(one.file, _Intervals())
        for start, stop in known.add(one.start, one.stop):
            window.append(Range(one.file, start, stop))
            size += stop - start
        if size >= window_bytes:
            yield from _of_window(window, taken, request_bytes, waste)
            window, size = [], 0
    yield from _of_window(window, taken, request_bytes, waste)


def _of_window(
    window: list[Range[File]],
    taken: dict[File, _Intervals],
    request_bytes: int,
    waste: float,
) -> Iterator[Request[File]]:
    files: dict[File, list[Range[File]]] = {}
    for one in window:
        files.setdefault(one.file, []).append(one)
    for file, ranges in files.items():
        ranges.sort(key=lambda one: one.start)
        for start, stop, needed in _joined(ranges, taken[file], request_bytes, waste):
            # What has no gaps may be cut anywhere.
            step = request_bytes if needed == stop - start else stop - start
            for first in range(start, stop, step):
                last = min(stop, first + step)
                yield Request(file, first, last, min(needed, last - first))


def _joined(
    ranges: list[Range[File]], taken: _Intervals, request_bytes: int, waste: float
) -> Iterator[tuple[int, int, int]]:
    start, stop, needed = ranges[0].start, ranges[0].stop, ranges[0].stop - ranges[0].start
    for one in ranges[1:]:
        size, gap = one.stop - one.start, one.start - stop
        gaps = stop - start - needed + gap
        close = gaps <= waste * (needed + size) and one.stop - start <= request_bytes
        if gaps == 0 or (close and taken.has_none(stop, one.start)):
            taken.add(stop, one.start)
            stop, needed = one.stop, needed + size
            continue
        yield start, stop, needed
        start, stop, needed = one.start, one.stop, size
    yield start, stop, needed


class _Intervals:
    """Bytes that were asked for already."""

    def __init__(self) -> None:
        self._found: list[tuple[int, int]] = []

    def add(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Those of some bytes that are new."""
        new: list[tuple[int, int]] = []
        position = start
        low = self._first_after(start)
        high = low
        while high < len(self._found) and self._found[high][0] < stop:
            first, last = self._found[high]
            if position < first:
                new.append((position, first))
            position = max(position, last)
            high += 1
        if position < stop:
            new.append((position, stop))
        if new:
            merged = self._found[low:high]
            ends = [start, stop, *(first for first, _ in merged), *(last for _, last in merged)]
            self._found[low:high] = [(min(ends), max(ends))]
        return new

    def has_none(self, start: int, stop: int) -> bool:
        """Whether none of some bytes was asked for."""
        place = self._first_after(start)
        return place == len(self._found) or self._found[place][0] >= stop

    def _first_after(self, start: int) -> int:
        """The place of the first interval that ends after ``start``."""
        low, high = 0, len(self._found)
        while low < high:
            middle = (low + high) // 2
            if self._found[middle][1] <= start:
                low = middle + 1
            else:
                high = middle
        return low
