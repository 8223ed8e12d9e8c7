"""Every variant compared with the reference, by every metric."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from quantrecipe.evaluate.scores.bootstrap import (
    RESAMPLES,
    Values,
    bca_interval,
    percentile_interval,
    resampled_means,
)
from quantrecipe.evaluate.scores.holm import holm
from quantrecipe.evaluate.scores.pairing import Paired, pair
from quantrecipe.evaluate.scores.reading import Score
from quantrecipe.evaluate.scores.student import (
    Differences,
    detectable,
    p_of_difference,
    p_of_equivalence,
    power_of_difference,
    power_of_equivalence,
    t_interval,
)
from quantrecipe.evaluate.scores.verdicts import verdict_of, without_spread
from quantrecipe.schema.evaluated import (
    EVALUATION_VERSION,
    FEW,
    POWER,
    Compared,
    DifferenceTest,
    EquivalenceTest,
    Evaluated,
    Intervals,
    JudgedRecipe,
    ScoreFile,
    Sensitivity,
    Software,
)
from quantrecipe.schema.evaluation import Evaluation, Metric


def compare(
    scores: Iterable[Score],
    evaluation: Evaluation,
    *,
    inputs: Sequence[ScoreFile],
    recipe: JudgedRecipe | None = None,
    leave_out: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Evaluated:
    """Compare variants with the reference of an evaluation.

    Args:
        scores: of all variants, the reference among them.
        evaluation: reference, metrics, margins and confidence.
        inputs: the files that the scores were read from.
        recipe: what declared the evaluation.
        leave_out: metrics among the scores that are not compared.
        resamples: of the bootstraps.
        seed: of the bootstraps.

    Raises:
        InvalidInput: scores have no partner.
    """
    paired = pair(scores, evaluation.reference, evaluation.metrics, leave_out=leave_out)
    found = [each for one in paired for each in _measured(one, evaluation, resamples, seed)]
    fields = {} if recipe is None else {"recipe": recipe}
    return Evaluated(
        kind="evaluation",
        version=EVALUATION_VERSION,
        **fields,
        reference=evaluation.reference,
        metrics=evaluation.metrics,
        confidence=evaluation.confidence,
        resamples=resamples,
        seed=seed,
        software=Software(
            quantrecipe=version("quantrecipe"), numpy=np.__version__, scipy=version("scipy")
        ),
        inputs=tuple(inputs),
        comparisons=_judged(found, evaluation),
        warnings=tuple(_warnings(found, evaluation)),
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    """A variant and the reference by one metric, before anything is known of the others."""

    paired: Paired
    variant: str
    metric: Metric
    mean: float
    reference_mean: float
    found: Differences
    intervals: Intervals
    differing: int

    @property
    def has_spread(self) -> bool:
        return self.found.deviation > 0


def _measured(
    paired: Paired, evaluation: Evaluation, resamples: int, seed: int
) -> Iterable[_Measured]:
    reference = paired.means[evaluation.reference]
    rivals = [variant for variant in paired.means if variant != evaluation.reference]
    differences = np.stack([paired.means[rival] - reference for rival in rivals], axis=1)
    # The same draws for all of them.
    means = resampled_means(differences, resamples, seed)
    for index, rival in enumerate(rivals):
        each = differences[:, index]
        # What rounding leaves of a spread is none.
        same = np.ptp(each) <= 1e-12 * np.abs(each).max()
        found = Differences(len(each), float(each.mean()), 0.0 if same else float(each.std(ddof=1)))
        yield _Measured(
            paired,
            rival,
            evaluation.metrics[paired.metric],
            float(paired.means[rival].mean()),
            float(reference.mean()),
            found,
            _intervals(each, means[:, index], found, evaluation.confidence),
            int(np.count_nonzero(each)),
        )


def _intervals(each: Values, means: Values, found: Differences, confidence: float) -> Intervals:
    if not found.deviation:
        only = (_number(found.mean), _number(found.mean))
        return Intervals(t=only, bca=None, percentile=only)
    bca = bca_interval(each, means, confidence)
    return Intervals(
        t=_pair(t_interval(found, confidence)),
        bca=None if bca is None else _pair(bca),
        percentile=_pair(percentile_interval(means, confidence)),
    )


def _judged(measured: Sequence[_Measured], evaluation: Evaluation) -> tuple[Compared, ...]:
    """Tests adjusted for each other, and verdicts."""
    alpha = 1 - evaluation.confidence
    spread = [one for one in measured if one.has_spread]
    plain = [p_of_difference(one.found) for one in spread]
    with_margin = [one for one in spread if one.metric.margin is not None and one.differing >= FEW]
    sides = [p_of_equivalence(one.found, one.metric.margin or 0.0) for one in with_margin]
    differences = {
        id(one): DifferenceTest(p=_number(p), p_holm=_number(adjusted))
        for one, p, adjusted in zip(spread, plain, holm(plain), strict=True)
    }
    equivalences = {
        id(one): EquivalenceTest(
            margin=one.metric.margin or 0.0,
            p_below=_number(below),
            p_above=_number(above),
            p=_number(max(below, above)),
            p_holm=_number(adjusted),
            power=_number(
                power_of_equivalence(one.found, one.metric.margin or 0.0, alpha / len(with_margin))
            ),
        )
        for one, (below, above), adjusted in zip(
            with_margin, sides, holm([max(both) for both in sides]), strict=True
        )
    }
    return tuple(
        _compared(
            one,
            differences.get(id(one)),
            equivalences.get(id(one)),
            # Holm holds the smallest p value to this; what it says of the others is no stricter.
            _sensitivity(one, alpha / len(spread)) if one.has_spread else None,
            alpha,
        )
        for one in measured
    )


def _compared(
    one: _Measured,
    difference: DifferenceTest | None,
    equivalence: EquivalenceTest | None,
    sensitivity: Sensitivity | None,
    alpha: float,
) -> Compared:
    if difference is None or sensitivity is None:
        verdict, why = without_spread(one.found.mean)
    else:
        verdict, why = verdict_of(
            one.found,
            difference,
            equivalence,
            sensitivity,
            one.metric,
            one.differing,
            alpha,
        )
    return Compared(
        metric=one.paired.metric,
        variant=one.variant,
        prompts=one.found.count,
        differing=one.differing,
        seeds=one.paired.seeds,
        mean=_number(one.mean),
        reference_mean=_number(one.reference_mean),
        difference=_number(one.found.mean),
        standard_deviation=_number(one.found.deviation),
        intervals=one.intervals,
        difference_test=difference,
        equivalence_test=equivalence,
        sensitivity=sensitivity,
        verdict=verdict,
        explanation=why,
    )


def _sensitivity(one: _Measured, alpha: float) -> Sensitivity:
    least, margin = _number(detectable(one.found, alpha, POWER)), one.metric.margin
    if margin is None:
        return Sensitivity(detectable=least)
    power = power_of_difference(one.found, margin, alpha)
    return Sensitivity(detectable=least, power_at_margin=_number(power))


def _warnings(measured: Sequence[_Measured], evaluation: Evaluation) -> Iterable[str]:
    for one in measured:
        where = f"{one.variant}, {one.paired.metric}"
        if 0 < one.differing < FEW and one.differing < one.found.count:
            yield (
                f"{where}: {one.differing} of {one.found.count:,} prompts differ, and of so few "
                "the t interval is too narrow if they are skewed; BCa is less so"
            )
        elif one.found.count < FEW:
            yield f"{where}: {one.found.count} prompts are few: other ones may well say otherwise"
        bca = one.intervals.bca
        if bca is not None and _holds_zero(bca) != _holds_zero(one.intervals.t):
            yield (
                f"{where}: of the t interval and the BCa interval at {evaluation.confidence:.0%}, "
                "one holds 0 and the other does not: more prompts would decide"
            )


def _holds_zero(interval: tuple[float, float]) -> bool:
    return interval[0] <= 0 <= interval[1]


def _pair(interval: tuple[float, float]) -> tuple[float, float]:
    return _number(interval[0]), _number(interval[1])


def _number(value: float) -> float:
    """With 12 significant digits, which do not depend on the order of a sum."""
    return float(f"{value:.12g}")
