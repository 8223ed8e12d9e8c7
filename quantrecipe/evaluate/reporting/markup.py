"""HTML and SVG, put together so that no text can become markup.

Every text that is not ``Markup`` already is escaped. Names in checkpoints are anybody's, so what
does not print is written as an escape too: control characters, and those that turn the direction
of a line around. The result is well-formed XML as well as HTML.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

VOID: Final = frozenset({"br", "hr", "img", "meta", "link", "col"})
"""Elements of HTML that have no end tag."""

_LONG: Final = 14
_ESCAPES: Final = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}
)

Value = str | int | float | None
"""What an attribute may be given; ``None`` leaves it out."""


class Markup(str):
    """Text that is markup, and not escaped again. Made here, and of nothing that was read."""

    __slots__ = ()


def clean(text: object) -> str:
    """A text on one line in which everything prints; runs of white space become one space."""
    words = " ".join(str(text).split())
    if words.isprintable():
        return words
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def escaped(text: object) -> Markup:
    """A text as markup; what is markup already stays."""
    if isinstance(text, Markup):
        return text
    return Markup(clean(text).translate(_ESCAPES))


def element(name: str, /, *children: object, **attributes: Value) -> Markup:
    """An element.

    Args:
        name: its name, never one that was read.
        children: markup, or texts, which are escaped; ``None`` is left out.
        attributes: by name, with ``_`` for ``-`` and one at the end to keep out of Python's way
            (``class_``). ``None`` leaves one out; numbers are written short.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written} />")
    return Markup(f"<{name}{written}>{joined(children)}</{name}>")


def joined(pieces: Iterable[object], between: str = "") -> Markup:
    """Pieces one after the other; texts among them are escaped."""
    return Markup(escaped(between).join(escaped(each) for each in pieces if each is not None))


def number(value: float) -> str:
    """A coordinate with at most two decimals, and none that say nothing."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _short(value: str | int | float) -> str | Markup:
    return value if isinstance(value, str) else number(value)


def table(
    headers: Iterable[object], rows: Iterable[Iterable[object]], align: str = "", caption: str = ""
) -> Markup:
    """A table with a head. Wide ones scroll by themselves.

    Args:
        headers: of the columns.
        rows: cells, markup or texts; the first of each row is its head.
        align: ``l``, ``r`` or, for sentences, ``w`` for each column; ``l`` beyond its end.
        caption: what it shows.
    """

    def look(column: int) -> str | None:
        return {"r": "n", "w": "w"}.get(align[column : column + 1])

    head = joined(
        element("th", each, scope="col", class_=look(column)) for column, each in enumerate(headers)
    )
    body = joined(
        element(
            "tr",
            _head(first),
            *(element("td", each, class_=look(column)) for column, each in enumerate(others, 1)),
        )
        for first, *others in rows
    )
    inside = [element("caption", caption)] if caption else []
    inside += [element("thead", element("tr", head)), element("tbody", body)]
    # Something that scrolls has to be reachable by keyboard.
    return element("div", element("table", *inside), class_="scroll", tabindex=0)


def _head(cell: object) -> Markup:
    """The head of a row; a long one keeps some room when a table is squeezed."""
    long = "long" if not isinstance(cell, Markup) and len(str(cell)) > _LONG else None
    return element("th", cell, scope="row", class_=long)


def folded(summary: str, *children: object) -> Markup:
    """What is shown once somebody asks for it, without any script."""
    return element("details", element("summary", summary), *children)
