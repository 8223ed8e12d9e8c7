"""SmoothQuant factors: the formula, and what it does where nothing was measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantrecipe.converter.smoothing import smoothquant_factors

MAXIMA = hnp.arrays(
    np.float32,
    st.integers(1, 30),
    elements=st.floats(0, 3.4028234663852886e38, width=32),
)


@given(inputs=MAXIMA, seed=st.integers(0, 2**32 - 1), alpha=st.floats(0, 1))
def test_factors_are_finite_and_positive_whatever_was_measured(
    inputs: np.ndarray, seed: int, alpha: float
) -> None:
    rng = np.random.default_rng(seed)
    weights = np.abs(rng.standard_normal(inputs.size) * 10.0 ** rng.uniform(-40, 30, inputs.size))
    weights[rng.random(inputs.size) < 0.2] = 0
    factors = smoothquant_factors(
        torch.from_numpy(inputs), torch.from_numpy(weights).float(), alpha
    )
    assert factors.dtype == torch.float32
    assert bool((factors.isfinite() & (factors > 0)).all())
    assert bool((factors[torch.from_numpy(inputs == 0)] == 1).all())


def test_the_formula() -> None:
    inputs, weights = torch.tensor([4.0, 9.0, 0.0, 2.0]), torch.tensor([1.0, 4.0, 3.0, 0.0])
    assert smoothquant_factors(inputs, weights, 0.5).tolist() == [2, 1.5, 1, 1]
    assert smoothquant_factors(inputs, weights, 1.0).tolist() == [4, 9, 1, 1]
    assert smoothquant_factors(inputs, weights, 0.0).tolist() == [1, 0.25, 1, 1]


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_factors_balance_both_sides_at_one_half(scale: float) -> None:
    inputs, weights = torch.tensor([3.0, 0.5]) * scale, torch.tensor([0.25, 7.0])
    factors = smoothquant_factors(inputs, weights, 0.5)
    torch.testing.assert_close(inputs / factors, weights * factors)


# Powers of two


@given(inputs=MAXIMA, seed=st.integers(0, 2**32 - 1), alpha=st.floats(0, 1))
def test_a_power_of_two_is_the_nearest_by_ratio(
    inputs: np.ndarray, seed: int, alpha: float
) -> None:
    exponents = np.random.default_rng(seed).uniform(-40, 30, inputs.size)
    maxima = torch.from_numpy(inputs), torch.from_numpy(10.0**exponents).float()
    plain = smoothquant_factors(*maxima, alpha)
    rounded = smoothquant_factors(*maxima, alpha, power_of_two=True)
    assert rounded.dtype == torch.float32
    assert bool((torch.frexp(rounded).mantissa == 0.5).all())
    off = (plain.double().log2() - rounded.double().log2()).abs()
    assert bool(((off <= 0.5 + 1e-12) | (rounded == 2.0**127)).all())
    assert bool((rounded[torch.from_numpy(inputs == 0)] == 1).all())


def test_powers_of_two_at_the_edges() -> None:
    root, largest = 2**0.5, torch.finfo(torch.float32).max
    values = torch.tensor([1.0, root * (1 - 1e-7), root * (1 + 1e-7), 3.0, largest, 2.0**-126])
    found = smoothquant_factors(values, torch.ones(6), 1.0, power_of_two=True)
    assert found.tolist() == [1.0, 1.0, 2.0, 4.0, 2.0**127, 2.0**-126]


@given(
    st.integers(-20, 20),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]),
)
def test_factors_follow_both_scales_and_the_order_of_channels(
    power: int, seed: int, alpha: float
) -> None:
    rng = np.random.default_rng(seed)
    inputs, weights = (torch.from_numpy(rng.lognormal(0, 2, 20)).float() for _ in range(2))
    factors = smoothquant_factors(inputs, weights, alpha)
    order = torch.from_numpy(rng.permutation(20))
    assert torch.equal(smoothquant_factors(inputs[order], weights[order], alpha), factors[order])
    scale = 2.0**power
    for scaled, expected in (
        (smoothquant_factors(inputs * scale, weights, alpha), factors * scale**alpha),
        (smoothquant_factors(inputs, weights * scale, alpha), factors / scale ** (1 - alpha)),
    ):
        torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=0)
