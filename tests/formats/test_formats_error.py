"""Errors are measured from what is stored, and rightly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantrecipe.formats import dequantize, quantize, row_errors, sqnr_db


@given(data=st.data())
@settings(max_examples=100)
def test_sums_are_those_of_float64(data: st.DataObject, kit: Any) -> None:
    weight, spec = data.draw(kit.cases())
    stored = quantize(weight, spec)
    assert stored.scale is not None
    before = weight.clone()
    errors = row_errors(weight, stored.codes, stored.scale, spec)
    difference = dequantize(stored.codes, stored.scale, spec) - weight
    assert torch.equal(weight, before)
    assert errors.signal.dtype == errors.noise.dtype == torch.float64
    torch.testing.assert_close(errors.signal, weight.double().square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(errors.noise, difference.double().square().sum(1), rtol=1e-5, atol=0)

    height, width = spec.group_shape(*weight.shape)
    each = stored.scale.float().repeat_interleave(height, 0).repeat_interleave(width, 1)
    worst = (difference.abs() / each[: weight.shape[0], : weight.shape[1]]).max()
    assert errors.worst_in_scales == float(worst)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-18, 1e-15, 1.0, 1e18, 1e20, 1e35])
def test_squares_beyond_float32_are_not_lost(magnitude: float, kit: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 300, generator=generator)
    weight[1:3] *= magnitude
    stored = quantize(weight, kit.spec("int8"))
    assert stored.scale is not None
    errors = row_errors(weight, stored.codes, stored.scale, kit.spec("int8"))
    difference = dequantize(stored.codes, stored.scale, kit.spec("int8")) - weight
    torch.testing.assert_close(errors.signal, weight.double().square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(errors.noise, difference.double().square().sum(1), rtol=1e-5, atol=0)


def test_worst_error_is_in_units_of_its_own_scale(kit: Any) -> None:
    weight = torch.tensor([[127.0, 0.25], [1270.0, 4.0]])
    stored = quantize(weight, kit.spec("int8"))
    assert stored.scale is not None
    errors = row_errors(weight, stored.codes, stored.scale, kit.spec("int8"))
    assert errors.signal.tolist() == pytest.approx([127.0**2 + 0.0625, 1270.0**2 + 16], rel=1e-6)
    assert errors.noise.tolist() == pytest.approx([0.0625, 16], rel=1e-6)
    assert errors.worst_in_scales == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [
        (100.0, 1.0, 20.0),
        (torch.tensor([60.0, 40.0]), torch.tensor([0.5, 0.5]), 20.0),
        (1e300, 1e-300, 6000.0),
        (1.0, 0.0, None),
        (0.0, 0.0, None),
        (0.0, 1.0, -math.inf),
    ],
    ids=["floats", "rows", "wide", "exact", "zeros", "all-noise"],
)
def test_sqnr(signal: Any, noise: Any, expected: float | None) -> None:
    found = sqnr_db(signal, noise)
    assert found == (None if expected is None else pytest.approx(expected))


def test_gaussian_int8_is_about_44_db(kit: Any) -> None:
    """``noise = s^2 / 12`` a value, for steps small against the values' spread."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(9))
    stored = quantize(weight, kit.spec("int8"))
    assert stored.scale is not None
    errors = row_errors(weight, stored.codes, stored.scale, kit.spec("int8"))
    expected = 4096 * stored.scale.double().flatten() ** 2 / 12
    torch.testing.assert_close(errors.noise, expected, rtol=0.1, atol=0)
    assert 0.499 < errors.worst_in_scales <= 0.5001
    assert sqnr_db(errors.signal, errors.noise) == pytest.approx(41.7, abs=1.5)
