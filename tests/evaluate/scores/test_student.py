"""t against SciPy, published examples and the definitions of what it computes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy")
from scipy import integrate, stats

from quantrecipe.evaluate.scores.student import (
    Differences,
    detectable,
    p_of_difference,
    p_of_equivalence,
    power_of_difference,
    power_of_equivalence,
    t_interval,
)

SLEEP = (1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4)
"""Extra hours of sleep by one drug over another in ten patients (Student 1908, table II)."""

SAMPLES = st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=25).filter(
    lambda values: float(np.std(values)) > 1e-3
)


def differences(values: object) -> Differences:
    array = np.asarray(values, np.float64)
    return Differences(len(array), float(array.mean()), float(array.std(ddof=1)))


def test_what_student_found() -> None:
    found = differences(SLEEP)
    assert found.mean == pytest.approx(1.58)
    assert found.deviation == pytest.approx(1.229995, abs=1e-6)
    # t = 1.58 / (1.229995 / sqrt(10)) = 4.0621 at 9 degrees of freedom, whose 97.5 % quantile is
    # 2.2622: 1.58 -+ 2.2622 * 0.388959.
    assert found.mean / found.error == pytest.approx(4.0621, abs=1e-4)
    assert p_of_difference(found) == pytest.approx(0.002833, abs=1e-6)
    assert t_interval(found, 0.95) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)


@given(SAMPLES)
def test_the_test_is_that_of_scipy(values: list[float]) -> None:
    found = differences(values)
    expected = stats.ttest_1samp(values, 0.0)
    assert p_of_difference(found) == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-14)
    interval = expected.confidence_interval(0.9)
    assert t_interval(found, 0.9) == pytest.approx(
        (interval.low, interval.high), rel=1e-9, abs=1e-9
    )


@given(SAMPLES, st.floats(0.01, 100))
def test_equivalence_is_two_one_sided_tests(values: list[float], margin: float) -> None:
    found = differences(values)
    expected = (
        stats.ttest_1samp(values, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(values, margin, alternative="less").pvalue,
    )
    assert p_of_equivalence(found, margin) == pytest.approx(expected, rel=1e-7, abs=1e-14)
    # The same as the interval at twice the risk within the margin.
    low, high = t_interval(found, 0.9)
    within = -margin < low and high < margin
    assert within == (max(p_of_equivalence(found, margin)) < 0.05)


def test_the_power_of_a_published_example() -> None:
    # The usual example of planning: an effect of 0.5 deviations takes 34 pairs for a power of 0.8
    # (Cohen 1988; G*Power says 0.8078).
    assert power_of_difference(Differences(34, 0.0, 1.0), 0.5, 0.05) == pytest.approx(
        0.8078, abs=5e-4
    )
    assert power_of_difference(Differences(33, 0.0, 1.0), 0.5, 0.05) < 0.8


@given(st.integers(2, 500), st.floats(0.01, 100), st.sampled_from([0.01, 0.05, 0.1]))
def test_what_is_detectable_is_detected_with_that_power(
    count: int, deviation: float, alpha: float
) -> None:
    found = Differences(count, 0.0, deviation)
    least = detectable(found, alpha, 0.8)
    assert power_of_difference(found, least, alpha) == pytest.approx(0.8, abs=1e-6)
    assert power_of_difference(found, -least, alpha) == pytest.approx(0.8, abs=1e-6)
    assert power_of_difference(found, 0.0, alpha) == pytest.approx(alpha, abs=2e-4)


def test_power_is_how_often_it_is_shown() -> None:
    random = np.random.default_rng(0)
    samples = random.normal(0.4, 1.0, (20_000, 25))
    shown = stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05
    found = Differences(25, 0.0, 1.0)
    assert shown.mean() == pytest.approx(power_of_difference(found, 0.4, 0.05), abs=0.012)
    inside = np.maximum(
        stats.ttest_1samp(samples - 0.4, -0.5, axis=1, alternative="greater").pvalue,
        stats.ttest_1samp(samples - 0.4, 0.5, axis=1, alternative="less").pvalue,
    )
    assert (inside < 0.05).mean() == pytest.approx(
        power_of_equivalence(found, 0.5, 0.05), abs=0.012
    )


@given(st.integers(2, 300), st.floats(0.1, 30), st.sampled_from([0.01, 0.05]))
@settings(max_examples=15)
def test_the_power_of_equivalence_is_its_integral(count: int, errors: float, alpha: float) -> None:
    found = Differences(count, 0.0, math.sqrt(count))  # a standard error of 1
    freedom = count - 1
    critical = stats.t.ppf(1 - alpha, freedom)

    def inside(spread: float) -> float:
        density = stats.chi2.pdf(spread**2 * freedom, freedom) * 2 * spread * freedom
        return float(density * (2 * stats.norm.cdf(errors - critical * spread) - 1))

    top = errors / critical
    expected, _ = integrate.quad(inside, 0, top, points=[min(1.0, top)], limit=200)
    assert power_of_equivalence(found, errors, alpha) == pytest.approx(expected, abs=2e-3)
