"""Scores made up for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quantrecipe.evaluate.scores.comparing import compare
from quantrecipe.evaluate.scores.reading import Score
from quantrecipe.schema.evaluated import Compared, Evaluated, ScoreFile
from quantrecipe.schema.evaluation import Evaluation, Metric

FILE = ScoreFile(name="scores.jsonl", sha256="0" * 64, scores=1)

Table = Mapping[str, Sequence[Sequence[float]]]
"""By variant, a row of seeds for each prompt."""


def scores(table: Table, metric: str = "m") -> list[Score]:
    return [
        Score(variant, metric, f"p{prompt}", seed, float(value), "f.jsonl", 1)
        for variant, rows in table.items()
        for prompt, row in enumerate(rows)
        for seed, value in enumerate(row)
    ]


def one_seed(values: Any) -> list[list[float]]:
    return [[float(value)] for value in np.asarray(values).ravel()]


def compared(
    what: Sequence[Score],
    *,
    margin: float | None = None,
    higher: bool = True,
    reference: str = "ref",
    resamples: int = 200,
    **more: Any,
) -> Evaluated:
    metric = Metric(higher_is_better=higher, margin=margin)
    names = dict.fromkeys(score.metric for score in what)
    evaluation = Evaluation(reference=reference, metrics=dict.fromkeys(names, metric))
    return compare(what, evaluation, inputs=[FILE], resamples=resamples, **more)


def only(found: Evaluated) -> Compared:
    (one,) = found.comparisons
    return one
