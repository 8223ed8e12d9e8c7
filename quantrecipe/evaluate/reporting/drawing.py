"""Pictures as lists of shapes, in pixels from the upper left corner; others render them.

Colours are called by what they are for (``palette``). Every shape lies inside its drawing, and
knows where, so that this can be checked.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Final, Literal

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

MarkShape = Literal["circle", "square", "diamond", "up", "down"]
Anchor = Literal["start", "middle", "end"]

SERIES_MARKS: Final[tuple[MarkShape, ...]] = ("circle", "square", "diamond", "up")
SERIES_DASHES: Final = ("", "7 3", "2 3", "8 3 2 3")

_NARROW: Final = frozenset("iljtfrI.,:;'|!()[] ")
_BROAD: Final = frozenset("mwMW@%…")


def text_width(text: str, size: float, bold: bool = False) -> float:
    """About how wide a text is, in pixels; rather too wide than too narrow."""
    units = 0.0
    for character in text:
        if character in _NARROW:
            units += 0.40
        elif character in _BROAD:
            units += 0.98
        elif unicodedata.east_asian_width(character) in "WF":
            units += 1.05
        else:
            units += 0.66 if character.isupper() or character.isdigit() else 0.62
    return units * size * (1.08 if bold else 1.0)


@dataclass(frozen=True, slots=True)
class Rect:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float
    fill: str | None = None
    stroke: str | None = None
    stroke_width: float = 1.0
    radius: float = 0.0
    title: str = ""

    def box(self) -> Box:
        """Where it is."""
        half = self.stroke_width / 2 if self.stroke else 0.0
        right, bottom = self.x + self.width + half, self.y + self.height + half
        return self.x - half, self.y - half, right, bottom


@dataclass(frozen=True, slots=True)
class Path:
    """A line through points, or what it goes around, if it is filled."""

    points: tuple[tuple[float, float], ...]
    stroke: str | None = None
    stroke_width: float = 1.0
    fill: str | None = None
    dash: str = ""
    opacity: float = 1.0
    title: str = ""

    def box(self) -> Box:
        """Where it is."""
        xs, ys = [x for x, _ in self.points], [y for _, y in self.points]
        half = self.stroke_width / 2 if self.stroke else 0.0
        return min(xs) - half, min(ys) - half, max(xs) + half, max(ys) + half


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark around a point; without ``fill`` it is open."""

    x: float
    y: float
    shape: MarkShape = "circle"
    radius: float = 3.5
    fill: str | None = None
    stroke: str | None = None
    title: str = ""

    def box(self) -> Box:
        """Where it is."""
        reach = self.radius + (0.75 if self.stroke else 0.0)
        return self.x - reach, self.y - reach, self.x + reach, self.y + reach

    def outline(self) -> tuple[tuple[float, float], ...]:
        """The corners of one that is no circle."""
        x, y, r = self.x, self.y, self.radius
        if self.shape == "square":
            r *= 0.88
            return (x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)
        if self.shape == "diamond":
            return (x, y - r), (x + r, y), (x, y + r), (x - r, y)
        turn = -1 if self.shape == "up" else 1
        return (x, y + turn * r), (x + r, y - turn * r * 0.8), (x - r, y - turn * r * 0.8)


@dataclass(frozen=True, slots=True)
class Text:
    """A line of text: ``y`` is where its letters stand."""

    x: float
    y: float
    text: str
    size: float = 11.0
    tone: str = "ink"
    anchor: Anchor = "start"
    bold: bool = False
    turned: bool = False
    title: str = ""

    def box(self) -> Box:
        """About where it is; a turned one reads upwards."""
        width = text_width(self.text, self.size, self.bold)
        before = {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        if self.turned:
            top = self.y - width + before
            return self.x - self.size * 0.8, top, self.x + self.size * 0.25, top + width
        left = self.x - before
        return left, self.y - self.size * 0.8, left + width, self.y + self.size * 0.25


@dataclass(frozen=True, slots=True)
class Group:
    """Shapes that have one title: what is told of them to who points at them."""

    shapes: tuple[Rect | Path | Mark | Text, ...]
    title: str

    def box(self) -> Box:
        """Where they are."""
        boxes = [shape.box() for shape in self.shapes]
        return (
            min(box[0] for box in boxes),
            min(box[1] for box in boxes),
            max(box[2] for box in boxes),
            max(box[3] for box in boxes),
        )


Shape = Rect | Path | Mark | Text | Group


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture.

    Attributes:
        width, height: in pixels.
        title: what it is, in a few words.
        text: what it shows, for who cannot see it.
        shapes: from the back to the front.
    """

    width: float
    height: float
    title: str
    text: str
    shapes: tuple[Shape, ...]


def fitted(text: str, width: float, size: float, bold: bool = False) -> str:
    """A text that is no wider than this; what is left out is in its middle."""
    from quantrecipe.evaluate.reporting.wording import shortened

    short, most = text, len(text)
    while most > 1 and text_width(short, size, bold) > width:
        most -= 1
        short = shortened(text, most)
    return short
