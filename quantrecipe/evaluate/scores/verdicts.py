"""What is shown, in words. That an interval holds 0 shows nothing, and is never called equality."""

from __future__ import annotations

from quantrecipe.evaluate.scores.student import Differences
from quantrecipe.schema.evaluated import (
    POWER,
    DifferenceTest,
    EquivalenceTest,
    Sensitivity,
    Verdict,
)
from quantrecipe.schema.evaluation import Metric


def verdict_of(
    found: Differences,
    difference: DifferenceTest,
    equivalence: EquivalenceTest | None,
    sensitivity: Sensitivity,
    metric: Metric,
    differing: int,
    alpha: float,
) -> tuple[Verdict, str]:
    """The word for a comparison, and why, in one line.

    A difference that is shown to be smaller than the margin does not matter, as was declared before
    it was measured; that it is there is said beside the verdict.

    Args:
        found: the differences.
        difference: the test of any difference.
        equivalence: of one as large as the margin, if there is a margin.
        sensitivity: what could have been shown.
        metric: its margin, and which way it is better.
        differing: prompts in which the two differ.
        alpha: the risk of a false finding.
    """
    different = difference.p_holm < alpha
    direction = "higher" if found.mean > 0 else "lower"
    said = f"{direction} by {abs(found.mean):.4g} ({p_text(difference.p_holm)})"
    if equivalence is not None and equivalence.p_holm < alpha:
        why = (
            f"a difference of {equivalence.margin:g} or more is ruled out, "
            f"{p_text(equivalence.p_holm)}"
        )
        if different:
            why += f"; within that it is {said}"
        return "equivalent within margin", why
    if different:
        better = (found.mean > 0) == metric.higher_is_better
        return "better" if better else "worse", said
    why = (
        f"a true difference of {sensitivity.detectable:.3g} would be found in {POWER:.0%} of such "
        f"tests, this one was not ({p_text(difference.p_holm)}); "
    )
    if metric.margin is None:
        return "not shown", why + "without a margin there is no test of equivalence"
    if equivalence is None:
        why += f"with {differing} prompts that differ, equivalence is not tested"
        return "not shown", why
    return "not shown", (
        f"{why}nor is one of {equivalence.margin:g} ruled out "
        f"({p_text(equivalence.p_holm)}, power {equivalence.power:.0%})"
    )


def without_spread(difference: float) -> tuple[Verdict, str]:
    """The same where all prompts differ by the same number, and t has nothing to go by."""
    what = "every prompt scores the same" if difference == 0 else "every prompt differs by the same"
    return "not shown", f"{what}, so nothing is known of the spread"


def p_text(p: float) -> str:
    """A p value as people write it."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"
