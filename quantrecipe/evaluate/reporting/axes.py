"""Axes: from numbers to pixels, and where ticks go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantrecipe.evaluate.reporting.drawing import Path, Shape, Text
from quantrecipe.evaluate.reporting.wording import figure

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_SIZE = 10.0
_ALIKE = 1e-9
_TINY = 1e-150
"""What is smaller is drawn as 0 is."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction of a picture.

    Attributes:
        low, high: the numbers at its ends; ``low < high``, and both above 0 if ``log``.
        start, stop: the pixels there.
        log: whether equal ratios are equally long.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a number; what lies beyond an end is put there."""
        value = min(max(value, self.low), self.high)
        share = (
            (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
            if self.log
            else (value - self.low) / (self.high - self.low)
        )
        return self.start + share * (self.stop - self.start)

    def ticks(self, most: int = 5) -> tuple[float, ...]:
        """Round numbers between its ends, at most so many."""
        return _powers(self.low, self.high, most) if self.log else _round(self.low, self.high, most)


def axis(
    values: Sequence[float],
    start: float,
    stop: float,
    *,
    log: bool = False,
    include: Sequence[float] = (),
    pad: float = 0.05,
) -> Axis:
    """An axis that holds all of these numbers, with some room around them.

    Args:
        values: finite; those that a logarithm does not take are left out of a ``log`` axis.
        start: the pixel where it begins.
        stop: the pixel where it ends.
        log: equal ratios are equally long, if any number is above 0.
        include: more numbers that it has to hold.
        pad: the room at each end, as a share of the whole.
    """
    found = [value for value in (*values, *include) if math.isfinite(value)]
    positive = [value for value in found if value > _TINY]
    log = log and bool(positive)
    found = positive if log else found
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if log:
        low, high = (low / 1.5, high * 1.5) if high / low < 1 + _ALIKE else (low, high)
        room = math.exp((math.log(high) - math.log(low)) * pad)
        return Axis(low / room, high * room, start, stop, True)
    largest = max(abs(low), abs(high))
    if high - low <= _ALIKE * largest or largest <= _TINY:
        reach = 0.1 * largest if largest > _TINY else 0.1
        low, high = low - reach, high + reach
    room = (high - low) * pad
    return Axis(low - room, high + room, start, stop)


def step_of(span: float, most: int) -> float:
    """The smallest round step that cuts a span into at most so many pieces."""
    if not span > 0 or not math.isfinite(span):
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    return next((s * power for s in _STEPS if s * power * most >= span * (1 - 1e-9)), 10 * power)


def _round(low: float, high: float, most: int) -> tuple[float, ...]:
    step = step_of(high - low, max(1, most - 1))
    first = math.ceil(low / step - 1e-9)
    found = [round(number * step, 12) for number in range(first, first + most + 2)]
    return tuple(value for value in found if low <= value <= high)


def _powers(low: float, high: float, most: int) -> tuple[float, ...]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first < 1:
        return _round(low, high, most)
    every = -(-(last - first + 1) // most)
    return tuple(10.0**power for power in range(first, last + 1, every))


def left_axis(
    y: Axis, left: float, right: float, most: int = 6, text: Callable[[float], str] = figure
) -> list[Shape]:
    """Lines across at round numbers, and what these are, left of them."""
    shapes: list[Shape] = []
    for value in y.ticks(most):
        at = y.at(value)
        shapes.append(Path(((left, at), (right, at)), "grid"))
        shapes.append(Text(left - 5, at + 3.5, text(value), _SIZE, "muted", "end"))
    return shapes


def bottom_axis(
    x: Axis, top: float, bottom: float, most: int = 6, text: Callable[[float], str] = figure
) -> list[Shape]:
    """A line below, and round numbers under it."""
    shapes: list[Shape] = [Path(((x.start, bottom), (x.stop, bottom)), "edge")]
    for value in x.ticks(most):
        at = x.at(value)
        shapes.append(Path(((at, bottom), (at, bottom + 4)), "edge"))
        shapes.append(Text(at, bottom + 15, text(value), _SIZE, "muted", "middle"))
    return shapes
