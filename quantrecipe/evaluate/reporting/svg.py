"""Drawings as SVG that takes its colours from the page, by class."""

from __future__ import annotations

from typing import Final

from quantrecipe.evaluate.reporting.drawing import Drawing, Group, Mark, Rect, Shape, Text
from quantrecipe.evaluate.reporting.markup import Markup, element, joined, number

_NARROW: Final = 330
_LEAST: Final = 0.8
"""Drawings that are wider than a telephone are scaled down this far, and scroll from then on."""


def svg(drawing: Drawing, name: str) -> Markup:
    """A drawing, scaled down where there is no room for it, and never up.

    Args:
        drawing: what to draw.
        name: an id that no other drawing of the page has.
    """
    return element(
        "svg",
        element("title", drawing.title, id=f"{name}-t"),
        element("desc", drawing.text, id=f"{name}-d"),
        *(_shape(shape) for shape in drawing.shapes),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {number(drawing.width)} {number(drawing.height)}",
        width=drawing.width,
        height=drawing.height,
        style=f"min-width:{number(drawing.width * _LEAST)}px" if drawing.width > _NARROW else None,
        role="img",
        aria_labelledby=f"{name}-t {name}-d",
    )


def _shape(shape: Shape) -> Markup:
    if isinstance(shape, Group):
        return element("g", element("title", shape.title), *map(_shape, shape.shapes))
    title = element("title", shape.title) if shape.title else None
    if isinstance(shape, Text):
        return _text(shape, title)
    classes = " ".join(
        name
        for name in (shape.fill and f"f-{shape.fill}", shape.stroke and f"s-{shape.stroke}")
        if name
    )
    if isinstance(shape, Rect):
        width = shape.stroke_width if shape.stroke and shape.stroke_width != 1 else None
        return element(
            "rect",
            title,
            x=shape.x,
            y=shape.y,
            width=shape.width,
            height=shape.height,
            rx=shape.radius or None,
            class_=classes,
            stroke_width=width,
        )
    if isinstance(shape, Mark):
        return _mark(shape, classes, title)
    return element(
        "path",
        title,
        d=_through(shape.points, closed=shape.fill is not None),
        class_=classes,
        stroke_width=shape.stroke_width if shape.stroke and shape.stroke_width != 1 else None,
        stroke_dasharray=shape.dash or None,
        opacity=shape.opacity if shape.opacity != 1 else None,
    )


def _mark(mark: Mark, classes: str, title: Markup | None) -> Markup:
    width = 1.5 if mark.stroke else None
    if mark.shape == "circle":
        return element(
            "circle", title, cx=mark.x, cy=mark.y, r=mark.radius, class_=classes, stroke_width=width
        )
    path = _through(mark.outline(), closed=True)
    return element("path", title, d=path, class_=classes, stroke_width=width)


def _text(text: Text, title: Markup | None) -> Markup:
    classes = [f"t-{text.tone}"]
    classes += ["b"] if text.bold else []
    turn = f"rotate(-90 {number(text.x)} {number(text.y)})" if text.turned else None
    return element(
        "text",
        title,
        text.text,
        x=text.x,
        y=text.y,
        font_size=text.size,
        class_=" ".join(classes),
        text_anchor=None if text.anchor == "start" else text.anchor,
        transform=turn,
    )


def _through(points: tuple[tuple[float, float], ...], closed: bool) -> str:
    path = "L".join(f"{number(x)} {number(y)}" for x, y in points)
    return f"M{path}{'Z' if closed else ''}"


def swatch(drawing_shapes: tuple[Shape, ...], width: float = 22, height: float = 14) -> Markup:
    """A small picture inside a line of text, that says nothing by itself."""
    return element(
        "svg",
        joined(_shape(shape) for shape in drawing_shapes),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=width,
        height=height,
        class_="swatch",
        aria_hidden="true",
    )
