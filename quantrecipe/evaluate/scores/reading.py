"""Files of scores, read strictly: JSON Lines or CSV, one score a line."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quantrecipe.checkpoint import SourceError
from quantrecipe.evaluate.scores.rows import (
    OPTIONAL,
    LineError,
    Note,
    check_fields,
    csv_rows,
    json_rows,
    no_number,
    numbered_lines,
)
from quantrecipe.schema.base import LABEL, PATTERN_MEANINGS
from quantrecipe.schema.evaluated import ScoreFile
from quantrecipe.schema.parsed import MAX_INTEGER, MAX_PROBLEMS, describe
from quantrecipe.schema.problems import InvalidInput, Problem

SUFFIXES: Final = (".jsonl", ".csv")
MAX_SCORES: Final = 2_000_000
"""Scores in all files together."""

_MAX_TEXT: Final = 1024
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
        rows = json_rows if path.suffix == ".jsonl" else csv_rows
        note = _noting(self.problems, str(path))
        try:
            with path.open("rb") as file:
                lines = numbered_lines(file, hashed.update)
                self._take(path, rows(lines, note), note)
        except OSError as error:
            raise SourceError(path, error) from error
        except _TooManyProblems:
            pass
        found = len(self.scores) - before
        return ScoreFile(name=path.name, sha256=hashed.hexdigest(), scores=found)

    def _take(self, path: Path, rows: Iterable[tuple[int, dict[str, Any]]], note: Note) -> None:
        named: bool | None = None
        for line, row in rows:
            try:
                if named is None:
                    named = OPTIONAL in row
                score = _score(row, path, line, named)
                self._add(score)
            except LineError as bad:
                note(line, bad)

    def _add(self, score: Score) -> None:
        if len(self.scores) == MAX_SCORES:
            raise LineError("too-large", f"there are more than {MAX_SCORES:,} scores")
        first = self.places.setdefault(
            (score.metric, score.variant, score.prompt, score.seed), score
        )
        if first is not score:
            raise LineError(
                "duplicate-score",
                f"{score.variant} has the {score.metric} of prompt {score.prompt!r}, seed "
                f"{score.seed}, already: {first.file}:{first.line}",
                "Leave one of them.",
            )
        self.scores.append(score)


def _noting(problems: list[Problem], file: str) -> Note:
    def note(line: int, bad: LineError) -> None:
        if len(problems) >= MAX_PROBLEMS:
            message = f"there are more than {MAX_PROBLEMS} faults; the rest is left out"
            problems.append(Problem("too-many-problems", message, "Mend these first.", file))
            raise _TooManyProblems
        problems.append(Problem(bad.kind, bad.message, bad.hint, file, line))

    return note


def _score(row: dict[str, Any], path: Path, line: int, named: bool) -> Score:
    check_fields(row)
    if named != (OPTIONAL in row):
        raise LineError(
            "mixed-variants",
            "some lines say which variant they are of, and others do not",
            "Say it in every line, or in none and name the file after it.",
        )
    return Score(
        variant=_label(row.get(OPTIONAL, path.stem), "variant"),
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
        raise LineError("wrong-type", message, f"Expected {PATTERN_MEANINGS[LABEL]}.")
    return value


def _prompt(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
        message = f"the prompt is {describe(value)}"
        raise LineError("wrong-type", message, "Give a short text or a whole number that names it.")
    return value


def _seed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INTEGER:
        raise LineError("wrong-type", f"the seed is {describe(value)}", "Give a whole number.")
    return value


def _value(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise LineError("wrong-type", f"the value is {describe(value)}", "Give a number.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        no_number(describe(value))
    return number
