"""Files of scores, read strictly: JSON Lines or CSV, one score a line."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quantrecipe.checkpoint import SourceError
from quantrecipe.schema.base import LABEL, PATTERN_MEANINGS
from quantrecipe.schema.evaluated import ScoreFile
from quantrecipe.schema.parsed import JSON_NUMBER, MAX_INTEGER, MAX_PROBLEMS, describe
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean

SUFFIXES: Final = (".jsonl", ".csv")
FIELDS: Final = ("prompt", "seed", "metric", "value")
MAX_LINE: Final = 1 << 16
"""Bytes of one line."""
MAX_SCORES: Final = 2_000_000
"""Scores in all files together."""

_OPTIONAL: Final = "variant"
_MAX_TEXT: Final = 1024
_MOST_DIGITS: Final = 16
_LABEL: Final = re.compile(LABEL)


@dataclass(frozen=True, slots=True)
class Score:
    """One number, and where it stands.

    Attributes:
        variant: what produced the output.
        metric: what was measured of it.
        prompt: what it was produced for.
        seed: of its noise.
        value: the score, finite.
        file, line: where it was read; lines count from 1.
    """

    variant: str
    metric: str
    prompt: str
    seed: int
    value: float
    file: str
    line: int


def read_scores(paths: Sequence[Path]) -> tuple[list[Score], tuple[ScoreFile, ...]]:
    """Read every file.

    A file whose lines have no ``variant`` is of the variant that it is called after.

    Returns:
        The scores, and the files by name.

    Raises:
        InvalidInput: a line is no score, or a score is there twice; every problem is in it.
        SourceError: a file cannot be read.
    """
    scores: list[Score] = []
    files: list[ScoreFile] = []
    reader = _Reader(scores)
    for path in paths:
        file = reader.read(path)
        if file is not None:
            files.append(file)
    if not reader.problems and not scores:
        reader.problems.append(Problem("no-scores", "there is no score in any of the files"))
    if reader.problems:
        raise InvalidInput(reader.problems)
    return scores, tuple(sorted(files, key=lambda file: (file.name, file.sha256)))


class _TooManyProblems(Exception):  # noqa: N818 - ends the reading; nobody sees it
    pass


class _LineError(ValueError):
    """A line is no score: a kind, what is wrong, and what to do."""

    def __init__(self, kind: str, message: str, hint: str | None = None) -> None:
        super().__init__(kind, message, hint)
        self.kind, self.message, self.hint = kind, message, hint


class _Reader:
    """What was read so far, over all files."""

    def __init__(self, scores: list[Score]) -> None:
        self.scores = scores
        self.problems: list[Problem] = []
        self.places: dict[tuple[str, str, str, int], Score] = {}

    def read(self, path: Path) -> ScoreFile | None:
        """Add a file's scores."""
        if path.suffix not in SUFFIXES:
            message = f"a file of scores ends in {' or '.join(SUFFIXES)}"
            self.problems.append(Problem("not-scores", message, file=str(path)))
            return None
        before, hashed = len(self.scores), hashlib.sha256()
        rows = _json_rows if path.suffix == ".jsonl" else _csv_rows
        note = _noting(self.problems, str(path))
        try:
            with path.open("rb") as file:
                lines = _lines(iter(lambda: file.readline(MAX_LINE + 1), b""), hashed.update)
                self._take(path, rows(lines, note), note)
        except OSError as error:
            raise SourceError(path, error) from error
        except _TooManyProblems:
            pass
        found = len(self.scores) - before
        return ScoreFile(name=path.name, sha256=hashed.hexdigest(), scores=found)

    def _take(self, path: Path, rows: Iterable[tuple[int, dict[str, Any]]], note: _Note) -> None:
        named: bool | None = None
        for line, row in rows:
            try:
                if named is None:
                    named = _OPTIONAL in row
                score = _score(row, path, line, named)
                self._add(score)
            except _LineError as bad:
                note(line, bad)

    def _add(self, score: Score) -> None:
        if len(self.scores) == MAX_SCORES:
            raise _LineError("too-large", f"there are more than {MAX_SCORES:,} scores")
        first = self.places.setdefault(
            (score.metric, score.variant, score.prompt, score.seed), score
        )
        if first is not score:
            raise _LineError(
                "duplicate-score",
                f"{score.variant} has the {score.metric} of prompt {score.prompt!r}, seed "
                f"{score.seed}, already: {first.file}:{first.line}",
                "Leave one of them.",
            )
        self.scores.append(score)


_Note = Callable[[int, _LineError], None]


def _noting(problems: list[Problem], file: str) -> _Note:
    def note(line: int, bad: _LineError) -> None:
        if len(problems) >= MAX_PROBLEMS:
            message = f"there are more than {MAX_PROBLEMS} faults; the rest is left out"
            problems.append(Problem("too-many-problems", message, "Mend these first.", file))
            raise _TooManyProblems
        problems.append(Problem(bad.kind, bad.message, bad.hint, file, line))

    return note


def _lines(
    raw: Iterator[bytes], update: Callable[[bytes], object]
) -> Iterator[tuple[int, str | _LineError]]:
    """Lines by number; one that is no text or too long is what is wrong with it."""
    for number, data in enumerate(raw, start=1):
        update(data)
        if len(data) > MAX_LINE:
            yield number, _LineError("too-large", f"the line has more than {MAX_LINE:,} bytes")
            return
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            yield number, _LineError("not-utf-8", "the line is not UTF-8 text", "Save it as UTF-8.")
            continue
        if number == 1 and text.startswith("\ufeff"):
            message = "the file begins with a byte order mark"
            yield number, _LineError("byte-order-mark", message, "Save it as UTF-8 without one.")
            continue
        yield number, text


def _json_rows(
    lines: Iterable[tuple[int, str | _LineError]], note: _Note
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in lines:
        if isinstance(text, _LineError):
            note(number, text)
        elif text.strip():
            try:
                yield number, _json_row(text)
            except _LineError as bad:
                note(number, bad)


def _json_row(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except _LineError:
        raise
    except (ValueError, RecursionError) as error:
        message = f"not a JSON value: {getattr(error, 'msg', error)}"
        raise _LineError("syntax", message, "JSON Lines have an object on each line.") from None
    if not isinstance(row, dict):
        raise _LineError("wrong-type", f"expected an object, found {describe(row)}")
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _LineError("duplicate-key", f"the key {key!r} is there twice", "Remove one.")
        found[key] = value
    return found


def _no_number(word: str) -> float:
    raise _LineError("not-finite", f"{word} is no score", "Leave that prompt out, everywhere.")


def _csv_rows(
    lines: Iterable[tuple[int, str | _LineError]], note: _Note
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows under the header of the first line; numbers are read as JSON has them."""

    def texts() -> Iterator[str]:
        for number, text in lines:
            if isinstance(text, _LineError):
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
                except _LineError as bad:
                    note(reader.line_num, bad)
    except csv.Error as error:
        note(reader.line_num, _LineError("syntax", f"not CSV: {error}"))
    except _LineError as bad:
        note(reader.line_num, bad)


def _check_header(header: list[str]) -> None:
    if len(set(header)) != len(header):
        raise _LineError("duplicate-key", "a column is there twice")
    _check_fields(header)


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise _LineError("syntax", f"{len(cells)} cells under {len(header)} columns")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for field in ("seed", "value"):
        if row[field].lower().lstrip("+-") in ("nan", "inf", "infinity"):
            _no_number(row[field])
    if row["seed"].isascii() and row["seed"].isdecimal() and len(row["seed"]) <= _MOST_DIGITS:
        row["seed"] = int(row["seed"])
    if JSON_NUMBER.fullmatch(row["value"]):
        row["value"] = float(row["value"])
    return row


def _check_fields(row: Iterable[str]) -> None:
    there = set(row)
    known = (*FIELDS, _OPTIONAL)
    for field in FIELDS:
        if field not in there:
            raise _LineError(
                "missing-field", f"there is no {field!r}", f"A score has {', '.join(known)}"
            )
    for field in sorted(there - set(known)):
        raise _LineError(
            "unknown-field", f"there is no field {field!r}", did_you_mean(field, known)
        )


def _score(row: dict[str, Any], path: Path, line: int, named: bool) -> Score:
    _check_fields(row)
    if named != (_OPTIONAL in row):
        raise _LineError(
            "mixed-variants",
            "some lines say which variant they are of, and others do not",
            "Say it in every line, or in none and name the file after it.",
        )
    return Score(
        variant=_label(row.get(_OPTIONAL, path.stem), "variant"),
        metric=_label(row["metric"], "metric"),
        prompt=_prompt(row["prompt"]),
        seed=_seed(row["seed"]),
        value=_value(row["value"]),
        file=str(path),
        line=line,
    )


def _label(value: Any, what: str) -> str:
    if not isinstance(value, str) or not _LABEL.fullmatch(value) or len(value) > 128:
        message = f"the {what} is {describe(value)}"
        raise _LineError("wrong-type", message, f"Expected {PATTERN_MEANINGS[LABEL]}.")
    return value


def _prompt(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
        message = f"the prompt is {describe(value)}"
        raise _LineError(
            "wrong-type", message, "Give a short text or a whole number that names it."
        )
    return value


def _seed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INTEGER:
        raise _LineError("wrong-type", f"the seed is {describe(value)}", "Give a whole number.")
    return value


def _value(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _LineError("wrong-type", f"the value is {describe(value)}", "Give a number.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        _no_number(describe(value))
    return number
