"""Comparisons: what changes nothing, what they say, and what has no partner."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy")
from scipy import stats

from quantrecipe.evaluate.scores.comparing import compare
from quantrecipe.evaluate.scores.reading import Score
from quantrecipe.evaluate.scores.student import Differences, detectable
from quantrecipe.schema.canonical import document_bytes
from quantrecipe.schema.evaluation import Evaluation, Metric
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.validation import validate_value
from tests.evaluate.scores.making import FILE, compared, one_seed, only, scores

# Multiples of 1/8: sums and differences of them are exact.
EIGHTHS = st.integers(-400, 400).map(lambda number: number / 8)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list[list[float]]]:
    prompts, seeds = draw(st.integers(2, 25)), draw(st.integers(1, 3))
    rows = st.lists(
        st.lists(EIGHTHS, min_size=seeds, max_size=seeds), min_size=prompts, max_size=prompts
    )
    return {variant: draw(rows) for variant in ("ref", "a", "b")}


@given(tables(), st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_the_order_of_rows_changes_nothing(
    table: dict[str, list[list[float]]], shuffling: random.Random
) -> None:
    rows = scores(table)
    before = compared(rows, margin=3.0)
    shuffling.shuffle(rows)
    assert compared(rows, margin=3.0) == before
    assert not validate_value(before.to_json_value(), kind="evaluation")


@given(tables())
@settings(max_examples=20)
def test_turning_all_scores_around_turns_the_verdict_with_its_direction(
    table: dict[str, list[list[float]]],
) -> None:
    turned = {name: [[-v for v in row] for row in rows] for name, rows in table.items()}
    one, other = (
        compared(scores(table), margin=3.0),
        compared(scores(turned), margin=3.0, higher=False),
    )
    for a, b in zip(one.comparisons, other.comparisons, strict=True):
        assert a.verdict == b.verdict
        assert a.difference == -b.difference
        for name in ("t", "percentile", "bca"):
            before, after = getattr(a.intervals, name), getattr(b.intervals, name)
            if before is not None:
                assert after == pytest.approx((-before[1], -before[0]), rel=1e-9, abs=1e-9)
        if a.equivalence_test is not None and b.equivalence_test is not None:
            assert a.equivalence_test.p_below == b.equivalence_test.p_above
            assert a.equivalence_test.p_holm == b.equivalence_test.p_holm


@given(tables(), st.sampled_from([0.25, 2.0, 1024.0]))
@settings(max_examples=20)
def test_another_unit_changes_no_verdict(table: dict[str, list[list[float]]], by: float) -> None:
    larger = {name: [[v * by for v in row] for row in rows] for name, rows in table.items()}
    one = compared(scores(table), margin=3.0)
    other = compared(scores(larger), margin=3.0 * by)
    for a, b in zip(one.comparisons, other.comparisons, strict=True):
        assert a.verdict == b.verdict
        assert a.difference_test == b.difference_test
        assert b.difference == pytest.approx(a.difference * by, rel=1e-9)
        assert b.intervals.t == pytest.approx([by * end for end in a.intervals.t], rel=1e-9)
        if a.sensitivity is not None and b.sensitivity is not None:
            assert b.sensitivity.detectable == pytest.approx(a.sensitivity.detectable * by)


@given(tables(), EIGHTHS)
@settings(max_examples=20)
def test_easier_prompts_for_all_variants_change_no_difference(
    table: dict[str, list[list[float]]], more: float
) -> None:
    easier = {
        name: [[v + more * (place % 3) for v in row] for place, row in enumerate(rows)]
        for name, rows in table.items()
    }
    one, other = compared(scores(table)), compared(scores(easier))
    for a, b in zip(one.comparisons, other.comparisons, strict=True):
        assert b.difference == pytest.approx(a.difference, abs=1e-9)
        assert b.intervals.t == pytest.approx(a.intervals.t, abs=1e-9)


@given(tables())
@settings(max_examples=20)
def test_seeds_are_no_more_prompts(table: dict[str, list[list[float]]]) -> None:
    averaged = {n: [[sum(row) / len(row)] for row in rows] for n, rows in table.items()}
    again = {n: [row * 2 for row in rows] for n, rows in averaged.items()}
    first, second, third = (compared(scores(each)) for each in (table, averaged, again))
    for a, b, c in zip(first.comparisons, second.comparisons, third.comparisons, strict=True):
        assert (b.seeds, c.seeds) == (1, 2)
        assert a.prompts == b.prompts == c.prompts == len(table["ref"])
        for other in (b, c):
            assert other.intervals.t == pytest.approx(a.intervals.t, abs=1e-9)
            assert other.standard_deviation == pytest.approx(a.standard_deviation, abs=1e-9)


def test_a_comparison_is_the_paired_t_test() -> None:
    draw = np.random.default_rng(0)
    reference = draw.normal(10, 3, 80)
    variant = reference + draw.normal(0.5, 1, 80)
    one = only(compared(scores({"ref": one_seed(reference), "v": one_seed(variant)})))
    expected = stats.ttest_rel(variant, reference)
    assert one.difference_test is not None
    assert one.difference_test.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert one.difference_test.p_holm == one.difference_test.p
    assert one.mean == pytest.approx(variant.mean())
    assert one.reference_mean == pytest.approx(reference.mean())
    assert one.standard_deviation == pytest.approx((variant - reference).std(ddof=1))
    assert one.verdict == "better"


def verdict(
    shift: float, spread: float, margin: float | None = 1.0, higher: bool = True, count: int = 100
) -> tuple[str, str]:
    """Of differences with exactly this mean and, at 100 prompts, 0.1 of this as standard error."""
    draw = np.random.default_rng(1).normal(size=count)
    draw = (draw - draw.mean()) / draw.std(ddof=1) * spread + shift
    table = {"ref": one_seed(np.zeros(count)), "v": one_seed(draw)}
    one = only(compared(scores(table), margin=margin, higher=higher))
    return one.verdict, one.explanation


def test_verdicts_and_why() -> None:
    assert verdict(2.0, 1.0) == ("better", "higher by 2 (p < 0.0001)")
    assert verdict(2.0, 1.0, higher=False)[0] == "worse"
    assert verdict(-2.0, 1.0) == ("worse", "lower by 2 (p < 0.0001)")
    assert verdict(-2.0, 1.0, higher=False)[0] == "better"
    word, why = verdict(0.05, 1.0)
    assert word == "equivalent within margin"
    assert why == "a difference of 1 or more is ruled out, p < 0.0001"
    word, why = verdict(0.5, 1.0)
    assert word == "equivalent within margin"
    assert why.endswith("; within that it is higher by 0.5 (p < 0.0001)")


def test_an_interval_that_holds_0_is_no_equivalence() -> None:
    for margin in (None, 0.1):
        word, why = verdict(0.05, 1.0, margin)
        assert word == "not shown"
        assert why.startswith("a true difference of 0.283 would be found in 80% of such tests")
    assert "without a margin there is no test of equivalence" in verdict(0.05, 1.0, None)[1]
    assert "nor is one of 0.1 ruled out (p = 0.31" in verdict(0.05, 1.0, 0.1)[1]


def test_a_few_prompts_that_differ_show_no_equivalence() -> None:
    values = np.zeros(200)
    values[:7] = 0.01
    found = compared(scores({"ref": one_seed(np.zeros(200)), "v": one_seed(values)}), margin=0.5)
    one = only(found)
    assert one.differing == 7
    assert one.equivalence_test is None
    assert one.verdict == "better"
    values[:7] = [0.01, -0.01, 0.01, -0.01, 0.01, -0.01, 0.001]
    found = compared(scores({"ref": one_seed(np.zeros(200)), "v": one_seed(values)}), margin=0.5)
    assert only(found).verdict == "not shown"
    assert only(found).explanation.endswith("7 prompts that differ, equivalence is not tested")
    assert any("7 of 200 prompts differ" in warning for warning in found.warnings)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_without_a_spread_nothing_is_shown(shift: float) -> None:
    reference = np.random.default_rng(0).normal(size=30)
    table = {"ref": one_seed(reference), "v": one_seed(reference + shift)}
    one = only(compared(scores(table), margin=1.0))
    assert one.verdict == "not shown"
    assert "so nothing is known of the spread" in one.explanation
    assert (one.difference_test, one.equivalence_test, one.sensitivity) == (None, None, None)
    assert one.intervals.t == pytest.approx((shift, shift))
    assert one.intervals.bca is None


def test_all_comparisons_share_one_risk() -> None:
    draw = np.random.default_rng(3)
    rows: list[Score] = []
    for metric in ("a", "b", "c"):
        table = {name: one_seed(draw.normal(0, 1, 40)) for name in ("ref", "u", "v")}
        rows += scores(table, metric)
    found = compared(rows, margin=5.0)
    assert [(each.metric, each.variant) for each in found.comparisons] == [
        (metric, variant) for metric in ("a", "b", "c") for variant in ("u", "v")
    ]
    tests = [each.difference_test for each in found.comparisons]
    smallest = min(test.p for test in tests if test)
    adjusted = min(test.p_holm for test in tests if test)
    assert adjusted == pytest.approx(min(1.0, 6 * smallest))
    for each in found.comparisons:
        assert each.sensitivity is not None
        spread = Differences(40, 0.0, each.standard_deviation)
        assert each.sensitivity.detectable == pytest.approx(detectable(spread, 0.05 / 6, 0.8))
    equal = [each.equivalence_test for each in found.comparisons]
    assert min(t.p_holm for t in equal if t) == pytest.approx(6 * min(t.p for t in equal if t))


def test_the_document_is_the_same_every_time() -> None:
    draw = np.random.default_rng(5)
    rows = scores({name: one_seed(draw.normal(size=30)) for name in ("ref", "v")})
    one, other = (document_bytes(compared(rows, seed=4).to_json_value()) for _ in range(2))
    assert one == other
    assert only(compared(rows, seed=5)).intervals.bca != only(compared(rows)).intervals.bca


def refused(rows: list[Score], *metrics: str, without: tuple[str, ...] = ()) -> list[str]:
    chosen = {name: Metric(higher_is_better=True) for name in metrics or ("m",)}
    with pytest.raises(InvalidInput) as caught:
        compare(
            rows,
            Evaluation(reference="ref", metrics=chosen),
            inputs=[FILE],
            leave_out=without,
            resamples=100,
        )
    return [f"{problem.kind}: {problem.message}" for problem in caught.value.problems]


FULL = {"ref": [[1.0, 2.0], [3.0, 4.0]], "v": [[1.0, 2.5], [3.5, 4.0]]}


def without(*keys: tuple[str, int, int]) -> list[Score]:
    """All of ``FULL`` but these: variant, prompt, seed."""
    gone = {(variant, f"p{prompt}", seed) for variant, prompt, seed in keys}
    return [s for s in scores(FULL) if (s.variant, s.prompt, s.seed) not in gone]


def test_what_has_no_partner_is_named() -> None:
    assert refused(without(("v", 1, 0), ("v", 1, 1))) == [
        "missing-prompt: 'ref' has the m of prompt 'p1', and 'v' has not"
    ]
    assert refused(without(("ref", 1, 0), ("ref", 1, 1), ("v", 0, 0), ("v", 0, 1)))[1:] == [
        "missing-prompt: 'ref' has the m of prompt 'p0', and 'v' has not",
        "missing-prompt: 'v' has the m of prompt 'p1', and 'ref' has not",
    ]
    assert refused(without(("v", 1, 0))) == [
        "other-seeds: 'v' has the m of prompt 'p1' with other seeds than 'ref': 1, not 0, 1"
    ]
    assert refused(without(("ref", 1, 0), ("v", 1, 0))) == [
        "mixed-seeds: prompt 'p1' has 1 seed for m, and other prompts have 2"
    ]
    other = [
        Score(s.variant, s.metric, s.prompt, s.seed + 10 * (s.variant == "v"), s.value, "f", 1)
        for s in scores(FULL)
    ]
    (message,) = refused(other)
    assert message.startswith("other-seeds: 'v' has the m of prompts 'p0', 'p1' with other seeds")
    assert message.endswith("than 'ref': 10, 11, not 0, 1")


def test_what_cannot_be_compared_is_named() -> None:
    assert refused([s for s in scores(FULL) if s.variant == "v"]) == [
        "unknown-variant: no scores are of the reference, 'ref'"
    ]
    assert refused([s for s in scores(FULL) if s.variant == "ref"]) == [
        "no-rival: all scores are of 'ref': nothing to compare it with"
    ]
    both = scores(FULL) + scores({"ref": FULL["ref"]}, "n")
    assert refused(both) == ["undeclared-metric: 'n' is not among the metrics of the evaluation"]
    assert refused(both, "m", "n") == ["missing-metric: there is no n of 'v'"]
    assert refused(scores(FULL), "m", "o") == [
        "missing-metric: there is no o of 'ref'",
        "missing-metric: there is no o of 'v'",
    ]
    single = [s for s in scores(FULL) if s.prompt == "p0"]
    assert refused(single) == ["too-few-prompts: one prompt has a m; a spread takes two"]
    assert refused(both, "m", "n", without=("n",)) == [
        "declared-metric: 'n' is declared, so it cannot be left out once it was measured"
    ]


def test_what_is_left_out_needs_no_partner() -> None:
    both = scores(FULL) + scores({"ref": FULL["ref"]}, "n")
    evaluation = Evaluation(reference="ref", metrics={"m": Metric(higher_is_better=True)})
    found = compare(both, evaluation, inputs=[FILE], leave_out=("n",), resamples=100)
    assert [each.metric for each in found.comparisons] == ["m"]
