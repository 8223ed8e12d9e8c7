"""Markdown, put together so that no text can become markup.

Every text that is not ``Markdown`` already is escaped. Names in checkpoints are anybody's: what
does not print is written as an escape, nothing becomes a link by itself, and no text ends a table,
a span of code or a fence. GitHub's flavour, which the Hub renders, is what is meant.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import quote

from quantrecipe.evaluate.reporting.markup import clean

_PIPE: Final = "&#124;"
_ESCAPES: Final = str.maketrans(
    {
        **{character: f"\\{character}" for character in "\\`*_[]{}~#$"},
        "&": "&amp;",
        "<": "&lt;",
        ">": "&gt;",
        "|": _PIPE,
    }
)
_ADDRESS: Final = re.compile(r"@|:/|www\.|mailto:", re.IGNORECASE)
"""What renderers make a link of by themselves."""

_OPENING: Final = re.compile(r"[-+=]|[0-9]+[.)](?= |$)")
"""What would begin a list, be a rule or underline a heading at the start of a line."""

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SAFE_IN_URL: Final = "/:?#@!$&'+,;=%~-."


class Markdown(str):
    """Text that is markup, and not escaped again. Made here, and of nothing that was read."""

    __slots__ = ()


def text(value: object) -> Markdown:
    """A text on one line; what is Markdown already stays. One with an address in it is code."""
    if isinstance(value, Markdown):
        return value
    words = clean(value)
    if _ADDRESS.search(words):
        return code(words)
    escaped = words.translate(_ESCAPES)
    start = _OPENING.match(escaped)
    if start is None:
        return Markdown(escaped)
    head = start[0][:-1] + f"\\{start[0][-1]}"
    return Markdown(head + escaped[start.end() :])


def code(value: object) -> Markdown:
    """A text as a span of code, in which nothing means anything.

    A ``|`` would end the cell of a table even there, so it stands between two spans.
    """
    words = clean(value)
    if not words:
        return Markdown("(empty)")
    return Markdown(_PIPE.join(_span(piece) for piece in words.split("|")))


def _span(words: str) -> str:
    if not words:
        return ""
    fence = "`" * (_longest_run(words) + 1)
    # A space on both sides is taken away again, and keeps backticks apart from the fence.
    pad = " " if words[0] in "` " or words[-1] in "` " else ""
    return f"{fence}{pad}{words}{pad}{fence}"


def codes(values: Iterable[object]) -> Markdown:
    """Several spans of code in a row."""
    return Markdown(", ".join(code(value) for value in values))


def joined(pieces: Iterable[object], between: str) -> Markdown:
    """Pieces with something of our own between them; texts among them are escaped."""
    return Markdown(between.join(text(piece) for piece in pieces))


def link(label: object, target: str) -> Markdown:
    """A link to an address of the web, or to a file beside the card; to nothing else."""
    shown = code(label)
    web = target.startswith(("https://", "http://"))
    elsewhere = target.startswith(("//", "\\")) or (_SCHEME.match(target) and not web)
    if elsewhere or not target or clean(target) != target:
        return Markdown(f"{shown} ({code(target)})")
    address = quote(target, safe=_SAFE_IN_URL).replace("&", "&amp;")
    return Markdown(f"[{shown}]({address})")


def table(headers: Sequence[object], rows: Iterable[Sequence[object]], align: str = "") -> Markdown:
    """A table.

    Args:
        headers: of the columns.
        rows: cells, one for each column; texts are escaped.
        align: ``l`` or ``r`` for each column; ``l`` beyond its end.
    """
    marks = ("---:" if align[at : at + 1] == "r" else "---" for at in range(len(headers)))
    lines = [_row(headers), f"| {' | '.join(marks)} |", *map(_row, rows)]
    return Markdown("\n".join(lines))


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(text(cell) for cell in cells)} |"


def listed(items: Iterable[object]) -> Markdown:
    """A list, an item a line."""
    return Markdown("\n".join(f"* {text(item)}" for item in items))


def fenced(lines: Sequence[str], language: str) -> Markdown:
    """Lines of code. They are shown as they are, so they hold nothing that does not print."""
    content = "\n".join(lines)
    fence = "`" * max(3, _longest_run(content) + 1)
    return Markdown(f"{fence}{language}\n{content}\n{fence}")


def folded(summary: str, *blocks: Markdown) -> Markdown:
    """What is shown once somebody asks for it.

    Args:
        summary: words of our own, without anything that was read.
        blocks: what is inside.
    """
    inside = "\n\n".join(blocks)
    return Markdown(f"<details>\n<summary>{summary}</summary>\n\n{inside}\n\n</details>")


def shell(argument: str) -> str:
    """An argument as a shell takes it, on one line and in characters that print."""
    if argument.isprintable():
        return shlex.quote(argument)
    # bash, zsh and ksh read escapes in $'…'.
    written = argument.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(c if c.isprintable() else ascii(c)[1:-1] for c in written)}'"


def _longest_run(words: str) -> int:
    return max(map(len, re.findall("`+", words)), default=0)
