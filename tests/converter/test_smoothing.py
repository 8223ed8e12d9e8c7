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
