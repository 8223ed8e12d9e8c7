"""An evaluation, and the file that it was read from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantrecipe.evaluate.evaluations import read_evaluation
from quantrecipe.evaluate.reporting.fields import Source
from quantrecipe.schema.evaluated import Evaluated


@dataclass(frozen=True, slots=True)
class Judged:
    """An evaluation.

    Attributes:
        source: the file.
        evaluated: what it says.
    """

    source: Source
    evaluated: Evaluated


def read_judged(path: Path) -> Judged:
    """Read an evaluation.

    Raises:
        InvalidInput: it is none, or claims what it has not tested.
        SourceError: the system could not read it.
    """
    evaluated, sha256 = read_evaluation(path)
    return Judged(Source(path.name, sha256), evaluated)
