"""An SQNR by depth: a small picture for each kind of module, a line for each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from quantrecipe.evaluate.reporting.axes import Axis, axis, left_axis
from quantrecipe.evaluate.reporting.drawing import (
    SERIES_DASHES,
    SERIES_MARKS,
    Drawing,
    Mark,
    Path,
    Shape,
    Text,
    fitted,
    text_width,
)
from quantrecipe.evaluate.reporting.palette import SERIES
from quantrecipe.evaluate.reporting.wording import decibels
from quantrecipe.schema.name_groups import natural

WIDTH: Final = 268
HEIGHT: Final = 172
_LEFT: Final = 34
_TOP: Final = 26
_BOTTOM: Final = 140


@dataclass(frozen=True, slots=True)
class Point:
    """A module of one kind in one layer.

    Attributes:
        part: its part.
        layer: the place of its layer among those of the stack, from 0.
        label: the number of its layer.
        sqnr_db: of it; ``None`` where there is no noise.
        kept: whether it is protected.
        title: all that is known of it.
    """

    part: str
    layer: int
    label: str
    sqnr_db: float | None
    kept: bool
    title: str


def panels(found: Mapping[str, Sequence[Point]], parts: Sequence[str]) -> list[Drawing]:
    """A panel for each kind, all with the same axes.

    Args:
        found: the modules of each kind that has any noise.
        parts: of the whole network, in the order of their colours.
    """
    values = [p.sqnr_db for points in found.values() for p in points if p.sqnr_db is not None]
    y = axis(values, _BOTTOM - 7 * min(len(parts), SERIES) - 3, _TOP + 2)
    return [_panel(kind, found[kind], parts, y) for kind in sorted(found, key=natural)]


def key(parts: Sequence[str]) -> Drawing:
    """What the lines are."""
    shapes: list[Shape] = []
    for index, part in enumerate(parts):
        y = 10 + 18 * index
        series = index % SERIES
        tone = f"series{series}"
        shapes.append(Path(((2, y), (30, y)), tone, 1.5, dash=SERIES_DASHES[series]))
        shapes.append(Mark(16, y, SERIES_MARKS[series], 3.5, tone))
        shapes.append(Text(38, y + 4, fitted(part, 190, 11), 11, title=part))
    y = 10 + 18 * len(parts)
    shapes.append(Mark(16, y, "square", 3.5, None, "edge"))
    shapes.append(Text(38, y + 4, "protected: not quantized", 11))
    text = f"One line for each part: {', '.join(parts)}"
    return Drawing(WIDTH, y + 12, "Legend: parts", text, tuple(shapes))


def _panel(kind: str, points: Sequence[Point], parts: Sequence[str], y: Axis) -> Drawing:
    last = max(point.layer for point in points)
    x = Axis(-0.5, max(last, 1) + 0.5, _LEFT, WIDTH - 8)
    shapes: list[Shape] = [
        Text(0, 13, fitted(kind, WIDTH - 2, 11.5, bold=True), 11.5, bold=True, title=kind),
        *left_axis(y, _LEFT, WIDTH - 8),
        Path(((_LEFT, _BOTTOM), (WIDTH - 8, _BOTTOM)), "edge"),
        *_layers(points, x),
    ]
    for part in parts:
        mine = sorted((p for p in points if p.part == part), key=lambda p: p.layer)
        if mine:
            shapes += _line(mine, parts.index(part) % SERIES, x, y)
    worst = min((p.sqnr_db for p in points if p.sqnr_db is not None), default=None)
    text = f"SQNR of {kind} by layer; the lowest is {decibels(worst)} dB"
    return Drawing(WIDTH, HEIGHT, kind, text, tuple(shapes))


def _layers(points: Sequence[Point], x: Axis) -> list[Shape]:
    labels = {point.layer: point.label for point in points}
    widest = max(text_width(label, 10) for label in labels.values()) + 8
    every = max(1, -(-len(labels) // max(1, int((x.stop - x.start) / widest))))
    every = next((each for each in (1, 2, 5, 10, 20, 50, 100) if each >= every), every)
    return [
        Text(x.at(layer), _BOTTOM + 14, labels[layer], 10, "muted", "middle")
        for layer in sorted(labels)
        if layer % every == 0 and x.at(layer) + text_width(labels[layer], 10) / 2 <= WIDTH
    ]


def _line(points: Sequence[Point], series: int, x: Axis, y: Axis) -> list[Shape]:
    tone, shapes = f"series{series}", list[Shape]()
    run: list[tuple[float, float]] = []
    marks: list[Shape] = []
    before = None
    for point in points:
        if point.sqnr_db is None:
            if point.kept:
                at = x.at(point.layer)
                below = _BOTTOM - 7 * series
                marks.append(Mark(at, below, "square", 2.8, "paper", tone, point.title))
            continue
        if before is not None and point.layer != before + 1:
            shapes += _segment(run, series)
            run = []
        before = point.layer
        run.append((x.at(point.layer), y.at(point.sqnr_db)))
        mark = SERIES_MARKS[series]
        marks.append(Mark(*run[-1], mark, 2.6, tone, title=point.title))
    return [*shapes, *_segment(run, series), *marks]


def _segment(run: Sequence[tuple[float, float]], series: int) -> list[Shape]:
    if len(run) < 2:
        return []
    return [Path(tuple(run), f"series{series}", 1.5, dash=SERIES_DASHES[series])]
