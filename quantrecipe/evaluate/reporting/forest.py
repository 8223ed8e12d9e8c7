"""Intervals of differences, metric by metric, with the margin of equivalence shaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from quantrecipe.evaluate.reporting.axes import Axis, axis, bottom_axis
from quantrecipe.evaluate.reporting.drawing import (
    Drawing,
    Group,
    Mark,
    MarkShape,
    Path,
    Rect,
    Shape,
    Text,
    fitted,
    text_width,
)
from quantrecipe.evaluate.reporting.wording import signed
from quantrecipe.schema.evaluated import Compared, Verdict
from quantrecipe.schema.evaluation import Metric

LOOKS: Final[Mapping[Verdict, tuple[MarkShape, str, bool]]] = MappingProxyType(
    {
        "better": ("up", "better", True),
        "worse": ("down", "worse", True),
        "equivalent within margin": ("diamond", "equivalent", True),
        "not shown": ("circle", "unknown", False),
    }
)
"""The mark of each verdict, its colour, and whether it is filled."""

_WIDTH: Final = 390
_ROW: Final = 40
_LEFT: Final = 12
_RIGHT: Final = _WIDTH - 12
_TOP: Final = 50


def forest(reference: str, name: str, metric: Metric, found: Sequence[Compared]) -> Drawing:
    """One metric: an interval for each variant.

    Args:
        reference: what they are compared with.
        name: of the metric.
        metric: its margin, and which way it is better.
        found: comparisons by this metric; at least one.
    """
    margin = metric.margin
    values = [value for each in found for value in (*each.intervals.t, each.difference)]
    x = axis(values, _LEFT, _RIGHT, include=(0.0, *((-margin, margin) if margin else ())), pad=0.08)
    bottom = _TOP + _ROW * len(found) + 4
    better = "right" if metric.higher_is_better else "left"
    shapes: list[Shape] = [
        Text(0, 13, fitted(name, _WIDTH, 12.5, bold=True), 12.5, bold=True, title=name),
        Text(
            0,
            30,
            fitted(f"less that of {reference}; better is to the {better}", _WIDTH, 10.5),
            10.5,
            "muted",
        ),
    ]
    if margin is not None:
        shapes.append(_band(x, margin, bottom))
    zero = x.at(0.0)
    shapes.append(Path(((zero, _TOP - 8), (zero, bottom)), "edge", dash="3 3"))
    for row, each in enumerate(found):
        shapes += _row(each, x, _TOP + row * _ROW)
    shapes += bottom_axis(x, _TOP, bottom, 5, signed)
    height = bottom + 22
    if margin is not None:
        shapes.append(Rect(1, bottom + 24, 18, 11, "band", "grid"))
        shapes.append(Text(25, bottom + 33.5, f"margin of equivalence, ±{margin:.4g}", 10))
        height += 18
    text = "; ".join(f"{each.variant}: {each.verdict}" for each in found)
    return Drawing(_WIDTH, height, f"{name}, differences from {reference}", text, tuple(shapes))


def _band(x: Axis, margin: float, bottom: float) -> Rect:
    left, right = x.at(-margin), x.at(margin)
    title = f"margin of equivalence: {-margin:.4g} to {margin:.4g}"
    return Rect(left, _TOP - 8, right - left, bottom - _TOP + 8, "band", title=title)


def _row(each: Compared, x: Axis, top: float) -> list[Shape]:
    shape, tone, filled = LOOKS[each.verdict]
    y = top + 24
    low, high = x.at(each.intervals.t[0]), x.at(each.intervals.t[1])
    said = text_width(each.verdict, 11, bold=True)
    title = f"{each.variant}: {each.verdict}. {interval_text(each)}; {each.explanation}"
    name = fitted(each.variant, _WIDTH - said - 30, 11)
    return [
        Text(_LEFT - 8, top + 10, name, 11, title=each.variant),
        Text(_RIGHT + 8, top + 10, each.verdict, 11, tone, "end", bold=True),
        Group(
            (
                Path(((low, y), (high, y)), tone, 2.2),
                Path(((low, y - 4), (low, y + 4)), tone, 1.6),
                Path(((high, y - 4), (high, y + 4)), tone, 1.6),
                Mark(x.at(each.difference), y, shape, 5, tone if filled else "paper", tone),
            ),
            title,
        ),
    ]


def interval_text(each: Compared) -> str:
    """A difference with its interval."""
    low, high = each.intervals.t
    return f"{signed(each.difference)} [{signed(low)}, {signed(high)}]"
