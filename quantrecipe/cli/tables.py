"""Plain-text tables and sizes, as every command prints them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_UNITS: Final = ("B", "KB", "MB", "GB", "TB", "PB")
_GAP: Final = "  "


def table(rows: Sequence[Sequence[object]], headers: Sequence[str] = (), align: str = "") -> str:
    """Rows under headers, in columns two spaces apart, without spaces at line ends.

    Args:
        rows: cells, turned into text; each row has as many.
        headers: one for each column; left out: none.
        align: ``l`` or ``r`` for each column; columns beyond its end go left.

    Returns:
        Lines without a final newline; ``""`` for no lines at all.

    Raises:
        ValueError: rows or headers of different lengths.
    """
    lines = [[_cell(cell) for cell in row] for row in ([headers] if headers else []) + [*rows]]
    if not lines:
        return ""
    columns = len(lines[0])
    if any(len(line) != columns for line in lines):
        raise ValueError("rows of a table differ in length")
    widths = [max(len(line[column]) for line in lines) for column in range(columns)]
    right = [align[column : column + 1] == "r" for column in range(columns)]
    return "\n".join(
        _GAP.join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def human_bytes(count: int) -> str:
    """A size in decimal units with three significant digits: ``512 B``, ``9.29 GB``."""
    return _scaled(count, _UNITS)


def human_count(count: int) -> str:
    """A number of things in thousands, millions, ...: ``512``, ``9.28 B``."""
    return _scaled(count, ("", "K", "M", "B", "T")).rstrip()


def _scaled(count: int, units: Sequence[str]) -> str:
    size, unit = float(count), 0
    # 999.5 would be written as 1000.
    while abs(size) >= 999.5 and unit < len(units) - 1:
        size /= 1000
        unit += 1
    if unit == 0:
        return f"{count} {units[0]}"
    digits = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{digits}f} {units[unit]}"


def _cell(value: object) -> str:
    """One line: what would break a table is written as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))
