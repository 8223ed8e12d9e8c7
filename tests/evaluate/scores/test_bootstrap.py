"""Bootstrap intervals are those of SciPy for the same draws, and draws are what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantrecipe.evaluate.scores.bootstrap import (
    Values,
    bca_interval,
    percentile_interval,
    resampled_means,
    times_drawn,
)

NUMBERS = st.floats(-100, 100, width=32)
SAMPLES = st.integers(3, 30).flatmap(lambda count: arrays(np.float64, count, elements=NUMBERS))
CONFIDENCES = st.sampled_from([0.8, 0.9, 0.95, 0.99])


@given(SAMPLES, CONFIDENCES, st.integers(0, 1000))
@settings(max_examples=25)
def test_intervals_are_those_of_scipy(values: Values, confidence: float, seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    from scipy.stats._resampling import BootstrapResult

    means = resampled_means(values, 400, seed)
    drawn = BootstrapResult(
        confidence_interval=None, bootstrap_distribution=means, standard_error=0.0
    )
    found = {"percentile": percentile_interval(means, confidence)}
    bca = bca_interval(values, means, confidence)
    if bca is not None:
        found["BCa"] = bca
    for method, interval in found.items():
        expected = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=0,
            bootstrap_result=drawn,
            method=method,
            confidence_level=confidence,
        ).confidence_interval
        assert interval == pytest.approx(tuple(expected), rel=1e-6, abs=1e-6)


def test_there_is_no_correction_without_a_spread() -> None:
    same = np.full(9, 0.1)
    assert bca_interval(same, resampled_means(same, 100, 0), 0.95) is None


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 99))
def test_each_resample_has_as_many_prompts(count: int, resamples: int, seed: int) -> None:
    times = times_drawn(count, resamples, seed)
    assert times.shape == (resamples, count)
    assert (times.sum(1) == count).all()
    assert np.array_equal(times, times_drawn(count, resamples, seed))


def test_prompts_are_drawn_alike() -> None:
    times = times_drawn(8, 20_000, 0)
    # A multinomial count has mean 1 and variance 1 - 1/8.
    assert times.mean(0) == pytest.approx(np.ones(8), abs=0.03)
    assert times.var(0) == pytest.approx(np.full(8, 0.875), abs=0.05)


def test_blocks_are_the_draws_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=(20, 3))
    whole = resampled_means(values, 500, 7)
    monkeypatch.setattr("quantrecipe.evaluate.scores.bootstrap._BLOCK_NUMBERS", 20 * 9)
    assert resampled_means(values, 500, 7) == pytest.approx(whole, rel=1e-12)
    assert np.array_equal(times_drawn(20, 500, 7), times_drawn(20, 500, 7))


@given(SAMPLES, st.sampled_from([-2.0, -1.0, 0.25, 8.0]))
@settings(max_examples=25)
def test_intervals_turn_and_stretch_with_the_numbers(values: Values, by: float) -> None:
    def both(numbers: Values) -> list[tuple[float, float] | None]:
        means = resampled_means(numbers, 300, 3)
        return [percentile_interval(means, 0.9), bca_interval(numbers, means, 0.9)]

    for before, after in zip(both(values), both(values * by), strict=True):
        if before is not None:
            assert after == pytest.approx(sorted(by * end for end in before), rel=1e-9, abs=1e-9)
