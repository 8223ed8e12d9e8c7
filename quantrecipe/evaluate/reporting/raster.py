"""Figures as PNG files, in the light colours. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

from quantrecipe.evaluate.reporting.drawing import (
    Drawing,
    Group,
    Mark,
    Path,
    Rect,
    Shape,
    Text,
    text_width,
)
from quantrecipe.evaluate.reporting.markup import clean
from quantrecipe.evaluate.reporting.palette import LIGHT
from quantrecipe.evaluate.reporting.sections import Figure
from quantrecipe.schema.problems import QuantrecipeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARGIN: Final = 16
_GAP: Final = 24
_ROW_WIDTH: Final = 1180
_INCH: Final = 100
_SCALE: Final = 2
_TITLE: Final = 15
_MOST_PIXELS: Final = 30_000
"""The longest side; a figure that is larger is drawn with fewer dots."""


def check_raster() -> None:
    """Whether PNG files can be drawn; to be asked before any work.

    Raises:
        QuantrecipeError: matplotlib is not there.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise QuantrecipeError(
            "PNG files need matplotlib\n  pip install 'quantrecipe[plot]', or leave --png out."
        ) from None


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, its drawings side by side, row by row.

    Raises:
        QuantrecipeError: matplotlib is not there.
    """
    check_raster()
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    placed, width, height = _placed(figure)
    dots = min(_SCALE * _INCH, int(_MOST_PIXELS * _INCH / max(width, height)))
    with rc_context({"text.parse_math": False, "font.family": "DejaVu Sans"}):
        canvas = Canvas(figsize=(width / _INCH, height / _INCH), dpi=dots)
        canvas.patch.set_facecolor(LIGHT["paper"])
        axes = canvas.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        size = _points(_TITLE)
        axes.text(_MARGIN, _MARGIN + 14, clean(figure.title), fontsize=size, weight="bold")
        for x, y, drawing in placed:
            for shape in drawing.shapes:
                _draw(axes, shape, x, y)
        written = io.BytesIO()
        canvas.savefig(written, format="png", facecolor=LIGHT["paper"], metadata={"Software": None})
    return written.getvalue()


def _placed(figure: Figure) -> tuple[list[tuple[float, float, Drawing]], float, float]:
    """Every drawing with its corner, and the size of all."""
    x, y, tallest, right = float(_MARGIN), _MARGIN + 32.0, 0.0, 0.0
    placed = list[tuple[float, float, Drawing]]()
    if figure.legend is not None:
        placed.append((x, y, figure.legend))
        right, y = x + figure.legend.width, y + figure.legend.height + _GAP
    for column in figure.columns:
        width = max(drawing.width for drawing in column)
        if x > _MARGIN and x + width > _ROW_WIDTH:
            x, y, tallest = float(_MARGIN), y + tallest + _GAP, 0.0
        below = y
        for drawing in column:
            placed.append((x, below, drawing))
            below += drawing.height + _GAP
        right, tallest = max(right, x + width), max(tallest, below - _GAP - y)
        x += width + _GAP
    title = _MARGIN + text_width(clean(figure.title), _TITLE, bold=True)
    return placed, max(right, title, 400.0) + _MARGIN, y + tallest + _MARGIN


def _points(pixels: float) -> float:
    return pixels * 72 / _INCH


def _colour(tone: str | None) -> str:
    return "none" if tone is None else LIGHT[tone]


def _draw(axes: Axes, shape: Shape, x: float, y: float) -> None:
    if isinstance(shape, Group):
        for inner in shape.shapes:
            _draw(axes, inner, x, y)
    elif isinstance(shape, Text):
        _draw_text(axes, shape, x, y)
    else:
        _draw_outline(axes, shape, x, y)


def _draw_text(axes: Axes, text: Text, x: float, y: float) -> None:
    across = {"start": "left", "middle": "center", "end": "right"}[text.anchor]
    axes.text(
        x + text.x,
        y + text.y,
        clean(text.text),
        fontsize=_points(text.size),
        color=_colour(text.tone),
        ha=across,
        va="baseline",
        weight="bold" if text.bold else "normal",
        rotation=90 if text.turned else 0,
        rotation_mode="anchor",
    )


def _draw_outline(axes: Axes, shape: Rect | Path | Mark, x: float, y: float) -> None:
    from matplotlib.patches import Circle, Patch, Polygon, Rectangle

    width = 1.5 if isinstance(shape, Mark) else shape.stroke_width
    look: dict[str, Any] = {
        "facecolor": _colour(shape.fill),
        "edgecolor": _colour(shape.stroke),
        "linewidth": _points(width) if shape.stroke else 0,
    }
    patch: Patch
    if isinstance(shape, Rect):
        patch = Rectangle((x + shape.x, y + shape.y), shape.width, shape.height, **look)
    elif isinstance(shape, Mark) and shape.shape == "circle":
        patch = Circle((x + shape.x, y + shape.y), shape.radius, **look)
    else:
        points = shape.outline() if isinstance(shape, Mark) else shape.points
        closed = shape.fill is not None or isinstance(shape, Mark)
        moved = [(x + px, y + py) for px, py in points]
        patch = Polygon(moved, closed=closed, fill=shape.fill is not None, **look)
    if isinstance(shape, Path):
        patch.set_alpha(shape.opacity if shape.opacity != 1 else None)
        if shape.dash:
            dashes = [float(each) / shape.stroke_width for each in shape.dash.split()]
            patch.set_linestyle((0, dashes))
    axes.add_patch(patch)
