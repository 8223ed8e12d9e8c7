"""Intervals hold the truth about as often as they say; the benchmark has the full numbers."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy")
import interval_coverage
from interval_coverage import METHODS, SCENARIOS, Scores, coverage, intervals


@pytest.mark.parametrize(("scenario", "points"), [("clip-like", 0.02), ("ned-like", 0.03)])
def test_two_hundred_prompts(scenario: str, points: float) -> None:
    for row in coverage(scenario, 200, repetitions=400, resamples=400, seed=11):
        assert row.held == pytest.approx(interval_coverage.CONFIDENCE, abs=points), row
        assert row.held + row.below + row.above == pytest.approx(1)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_truth_is_the_mean_of_many(scenario: str) -> None:
    drawn = SCENARIOS[scenario].draw(np.random.default_rng(0), 200_000)
    error = drawn.std() / 200_000**0.5
    assert abs(drawn.mean() - SCENARIOS[scenario].true) < 4 * error


def test_the_published_interval_is_that_of_the_scenario() -> None:
    (row,) = (r for r in coverage("clip-like", 200, 40, 200) if r.method == "t")
    assert row.width == pytest.approx(2.64 - 1.21, rel=0.05)


def test_scores_have_mass_at_both_ends() -> None:
    scores = Scores(0.1, 0.3, 1.0, 1.0)
    found = scores.at(np.array([0.05, 0.1, 0.4, 0.7, 0.9]))
    assert found == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])
    assert scores.mean == pytest.approx(0.6)


def test_differences_without_a_spread_are_a_point() -> None:
    assert intervals(np.full(5, 0.25), 50, 0) == [(0.25, 0.25)] * len(METHODS)
