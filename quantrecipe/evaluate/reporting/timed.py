"""Numbers of a benchmark: whatever rows of labels and numbers a JSON file has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantrecipe.evaluate.reporting.fields import Fields, Source, read_fields

_WHAT: Final = "a list of measurements, or an object of them by name"
MOST_ROWS: Final = 200
MOST_NUMBERS: Final = 12


@dataclass(frozen=True, slots=True)
class Row:
    """A measurement: what was measured, in words, and the numbers by their names."""

    labels: tuple[tuple[str, str], ...]
    numbers: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Timed:
    """A benchmark.

    Attributes:
        source: the file.
        rows: in the order of the file.
    """

    source: Source
    rows: tuple[Row, ...]


def read_timed(path: Path) -> Timed:
    """Read a benchmark.

    A list has an object for each row; an object has one for each name. Texts in a row say what was
    measured, numbers what came out; an object in a row gives its entries to the row, each under
    both names; all else is left out.

    Raises:
        InvalidInput: it is nothing of that kind, or has too much of it for a page.
        SourceError: the system could not read it.
    """
    found, source = read_fields(path, _WHAT)
    if isinstance(found.value, dict):
        rows = [_row(found[key], key) for key in found.object()]
    else:
        rows = [_row(each, None) for each in found.items()]
    rows = [row for row in rows if row.numbers]
    if not rows:
        raise found.refused("there are no numbers in it")
    if len(rows) > MOST_ROWS:
        raise found.refused(f"there are {len(rows)} rows, and a page has room for {MOST_ROWS}")
    return Timed(source, tuple(rows))


def _row(found: Fields, name: str | None) -> Row:
    labels = [] if name is None else [("", name)]
    numbers: list[tuple[str, float]] = []
    for key, value in found.object().items():
        if isinstance(value, str):
            labels.append((key, value))
        elif isinstance(value, dict):
            numbers += [
                (f"{key}: {each}", float(inner))
                for each, inner in value.items()
                if isinstance(inner, int | float) and not isinstance(inner, bool)
            ]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers.append((key, float(value)))
    return Row(tuple(labels), tuple(numbers[:MOST_NUMBERS]))
