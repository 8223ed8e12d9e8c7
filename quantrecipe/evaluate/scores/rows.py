"""Lines of a file of scores as rows of fields: JSON Lines or CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Final, NoReturn

from quantrecipe.schema.parsed import JSON_NUMBER, describe
from quantrecipe.schema.problems import did_you_mean

FIELDS: Final = ("prompt", "seed", "metric", "value")
OPTIONAL: Final = "variant"
MAX_LINE: Final = 1 << 16
"""Bytes of one line."""

_MOST_DIGITS: Final = 16


class LineError(ValueError):
    """A line is no score: a kind, what is wrong, and what to do."""

    def __init__(self, kind: str, message: str, hint: str | None = None) -> None:
        super().__init__(kind, message, hint)
        self.kind, self.message, self.hint = kind, message, hint


Note = Callable[[int, LineError], None]
"""Told of a line that is no score."""


def numbered_lines(
    file: BinaryIO, update: Callable[[bytes], object]
) -> Iterator[tuple[int, str | LineError]]:
    """Lines by number; one that is no text or too long is what is wrong with it.

    Args:
        file: what they are read of; nothing is read beyond a line that is too long.
        update: given all that is read.
    """
    for number, data in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
        update(data)
        if len(data) > MAX_LINE:
            yield number, LineError("too-large", f"the line has more than {MAX_LINE:,} bytes")
            return
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            yield number, LineError("not-utf-8", "the line is not UTF-8 text", "Save it as UTF-8.")
            continue
        if number == 1 and text.startswith("\ufeff"):
            message = "the file begins with a byte order mark"
            yield number, LineError("byte-order-mark", message, "Save it as UTF-8 without one.")
            continue
        yield number, text


def json_rows(
    lines: Iterable[tuple[int, str | LineError]], note: Note
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The object of each line, with the line's number; empty lines have none."""
    for number, text in lines:
        if isinstance(text, LineError):
            note(number, text)
        elif text.strip():
            try:
                yield number, _json_row(text)
            except LineError as bad:
                note(number, bad)


def _json_row(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text, object_pairs_hook=_once, parse_constant=no_number)
    except LineError:
        raise
    except (ValueError, RecursionError) as error:
        message = f"not a JSON value: {getattr(error, 'msg', error)}"
        raise LineError("syntax", message, "JSON Lines have an object on each line.") from None
    if not isinstance(row, dict):
        raise LineError("wrong-type", f"expected an object, found {describe(row)}")
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise LineError("duplicate-key", f"the key {key!r} is there twice", "Remove one.")
        found[key] = value
    return found


def no_number(word: str) -> NoReturn:
    """Refuse what is not finite.

    Raises:
        LineError: always.
    """
    raise LineError("not-finite", f"{word} is no score", "Leave that prompt out, everywhere.")


def csv_rows(
    lines: Iterable[tuple[int, str | LineError]], note: Note
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows under the header of the first line; numbers are read as JSON has them."""

    def texts() -> Iterator[str]:
        for number, text in lines:
            if isinstance(text, LineError):
                note(number, text)
            else:
                yield text

    reader = csv.reader(texts(), strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if header is None:
                header = cells
                _check_header(header)
            elif cells:
                try:
                    yield reader.line_num, _csv_row(header, cells)
                except LineError as bad:
                    note(reader.line_num, bad)
    except csv.Error as error:
        note(reader.line_num, LineError("syntax", f"not CSV: {error}"))
    except LineError as bad:
        note(reader.line_num, bad)


def _check_header(header: list[str]) -> None:
    if len(set(header)) != len(header):
        raise LineError("duplicate-key", "a column is there twice")
    check_fields(header)


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise LineError("syntax", f"{len(cells)} cells under {len(header)} columns")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for field in ("seed", "value"):
        if row[field].lower().lstrip("+-") in ("nan", "inf", "infinity"):
            no_number(row[field])
    if row["seed"].isascii() and row["seed"].isdecimal() and len(row["seed"]) <= _MOST_DIGITS:
        row["seed"] = int(row["seed"])
    if JSON_NUMBER.fullmatch(row["value"]):
        row["value"] = float(row["value"])
    return row


def check_fields(row: Iterable[str]) -> None:
    """Whether a row has the fields of a score, and no other.

    Raises:
        LineError: it has not.
    """
    there = set(row)
    known = (*FIELDS, OPTIONAL)
    for field in FIELDS:
        if field not in there:
            raise LineError(
                "missing-field", f"there is no {field!r}", f"A score has {', '.join(known)}"
            )
    for field in sorted(there - set(known)):
        raise LineError("unknown-field", f"there is no field {field!r}", did_you_mean(field, known))
