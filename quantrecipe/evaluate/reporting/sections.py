"""Sections of the report: their pictures, and what is said around them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quantrecipe.evaluate.reporting.drawing import Drawing
from quantrecipe.evaluate.reporting.markup import Markup, element
from quantrecipe.evaluate.reporting.svg import svg


@dataclass(frozen=True, slots=True)
class Figure:
    """Pictures that belong together: side by side on the page, in one file as PNG.

    Attributes:
        name: of letters, digits and ``-``; no other figure of the report has it.
        title: what it shows, in a few words.
        columns: side by side, in each at least one drawing, one below the other.
        caption: how to read it.
        legend: what colours and marks mean, above all of them.
    """

    name: str
    title: str
    columns: tuple[tuple[Drawing, ...], ...]
    caption: str = ""
    legend: Drawing | None = None

    @classmethod
    def of(
        cls,
        name: str,
        title: str,
        drawings: Iterable[Drawing],
        caption: str = "",
        legend: Drawing | None = None,
    ) -> Figure:
        """A figure with each drawing in a column of its own."""
        return cls(name, title, tuple((each,) for each in drawings), caption, legend)

    @property
    def drawings(self) -> tuple[Drawing, ...]:
        """All of them, the legend first."""
        first = () if self.legend is None else (self.legend,)
        return (*first, *(drawing for column in self.columns for drawing in column))

    def markup(self) -> Markup:
        """It, as the page has it."""
        panels = (
            _panel(column, f"{self.name}-{index}") for index, column in enumerate(self.columns)
        )
        return element(
            "figure",
            None if self.legend is None else _panel((self.legend,), f"{self.name}-legend"),
            element("div", *panels, class_="panels"),
            element("figcaption", self.caption) if self.caption else None,
        )


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page.

    Attributes:
        name: its anchor.
        title: its heading.
        content: what is under it, figures included.
        figures: the figures that are in it.
    """

    name: str
    title: str
    content: tuple[object, ...]
    figures: tuple[Figure, ...] = ()

    def markup(self) -> Markup:
        """It, as the page has it."""
        return element("section", element("h2", self.title), *self.content, id=self.name)


def _panel(drawings: Iterable[Drawing], name: str) -> Markup:
    drawn = (svg(drawing, f"{name}-{index}") for index, drawing in enumerate(drawings))
    return element("div", *drawn, class_="panel")


def paragraph(text: object) -> Markup:
    """A paragraph of text."""
    return element("p", text)


def notes(texts: tuple[str, ...], title: str = "Warnings") -> Markup | None:
    """What to know before believing something, if there is anything."""
    if not texts:
        return None
    return element(
        "div",
        element("strong", title),
        element("ul", *(element("li", text) for text in texts)),
        class_="notes",
    )
