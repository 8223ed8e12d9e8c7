"""Which bytes of a range have been dealt with."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class Coverage:
    """Half-open intervals of ``[0, size)``, merged as they touch; none is taken twice.

    A plain count of bytes would be satisfied by writing one half of a tensor two times.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._starts: list[int] = []
        self._ends: list[int] = []

    @property
    def complete(self) -> bool:
        """Whether every byte is covered."""
        return self.size == 0 or (self._starts == [0] and self._ends == [self.size])

    @property
    def missing(self) -> int:
        """How many bytes are not covered."""
        return self.size - sum(self._ends) + sum(self._starts)

    def claim(self, start: int, end: int) -> None:
        """Cover ``[start, end)``.

        Raises:
            ValueError: it reaches outside, or into what is covered already.
        """
        if not 0 <= start <= end <= self.size:
            raise ValueError(f"bytes {start} to {end} of {self.size}")
        if start == end:
            return
        at = bisect_right(self._starts, start)
        before = at > 0 and self._ends[at - 1] > start
        if before or bisect_left(self._starts, end) > at:
            raise ValueError(f"bytes {start} to {end} were written before, at least in part")
        joins_left = at > 0 and self._ends[at - 1] == start
        joins_right = at < len(self._starts) and self._starts[at] == end
        if joins_left and joins_right:
            self._ends[at - 1] = self._ends[at]
            del self._starts[at], self._ends[at]
        elif joins_left:
            self._ends[at - 1] = end
        elif joins_right:
            self._starts[at] = start
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)
