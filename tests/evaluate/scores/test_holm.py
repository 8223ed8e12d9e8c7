"""Holm's method against its definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.evaluate.scores.holm import holm

P_VALUES = st.lists(st.floats(0, 1), max_size=8)


def rejected(p_values: list[float], alpha: float) -> set[int]:
    """Step by step, as Holm has it: the smallest against alpha / m, the next alpha / (m - 1)."""
    left = set(range(len(p_values)))
    while left:
        least = min(left, key=lambda index: p_values[index])
        if len(left) * p_values[least] > alpha:
            break
        left.remove(least)
    return set(range(len(p_values))) - left


@given(P_VALUES, st.floats(0.001, 0.5))
def test_what_is_below_alpha_is_what_is_rejected_step_by_step(
    p_values: list[float], alpha: float
) -> None:
    adjusted = holm(p_values)
    assert {index for index, p in enumerate(adjusted) if p <= alpha} == rejected(p_values, alpha)


@given(P_VALUES)
def test_adjusted_values_keep_the_order_and_stay_probabilities(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= after <= 1 for p, after in zip(p_values, adjusted, strict=True))
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert [after for _, after in pairs] == sorted(adjusted)


def test_an_example_by_hand() -> None:
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 1 x 0.04, which may not be below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_one_test_is_left_alone() -> None:
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
