"""Numbers of a benchmark as bars, each number by itself: they need not have one unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from quantrecipe.evaluate.reporting.drawing import Drawing, Rect, Shape, Text, fitted, text_width
from quantrecipe.evaluate.reporting.timed import Row, Timed
from quantrecipe.evaluate.reporting.wording import figure

MOST_BARS: Final = 24
MOST_PANELS: Final = 6
_WIDTH: Final = 390
_ROW: Final = 32


def numbers_of(found: Timed) -> list[str]:
    """The names of all numbers, in the order of the file."""
    return list(dict.fromkeys(name for row in found.rows for name, _ in row.numbers))


def panels(found: Timed) -> list[Drawing]:
    """A panel for each number, up to ``MOST_PANELS``; of negative ones there is none."""
    drawn = []
    for name in numbers_of(found):
        rows = [(row, value) for row in found.rows for key, value in row.numbers if key == name]
        if len(rows) > 1 and min(value for _, value in rows) >= 0:
            drawn.append(_panel(name, rows[:MOST_BARS]))
    return drawn[:MOST_PANELS]


def label(row: Row) -> str:
    """What a row is, in words."""
    return ", ".join(text for _, text in row.labels) or "(no name)"


def _panel(name: str, rows: Sequence[tuple[Row, float]]) -> Drawing:
    most = max(value for _, value in rows) or 1.0
    shapes: list[Shape] = [
        Text(0, 13, fitted(name, _WIDTH - 2, 12, bold=True), 12, bold=True, title=name)
    ]
    for index, (row, value) in enumerate(rows):
        y, text = 24 + index * _ROW, figure(value)
        room = _WIDTH - text_width(text, 11, bold=True) - 10
        words = label(row)
        shapes.append(Text(0, y + 11, fitted(words, room, 11), 11, title=words))
        shapes.append(Text(_WIDTH - 1, y + 11, text, 11, anchor="end", bold=True))
        shapes.append(Rect(0, y + 15, _WIDTH, 9, "plain", radius=2))
        shapes.append(Rect(0, y + 15, value / most * _WIDTH, 9, "series0", radius=2))
    text = "; ".join(f"{label(row)}: {figure(value)}" for row, value in rows)
    return Drawing(_WIDTH, 24 + len(rows) * _ROW, name, text, tuple(shapes))
