"""Errors are measured from what is stored, and rightly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats import (
    NonFinite,
    dequantize,
    error,
    get_format,
    quantize,
    row_errors,
    sqnr_db,
)
from quantrecipe.formats.error import sums_of_squares


def in_order(block: Tensor) -> Tensor:
    """The documented order, one addition after the other."""
    lanes = np.zeros((len(block), 1024))
    for column, numbers in enumerate(block.double().numpy().T):
        lanes[:, column % 1024] += numbers * numbers
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return torch.from_numpy(lanes[:, 0])


@given(data=st.data())
@settings(max_examples=100)
def test_sums_are_those_of_the_documented_order(data: st.DataObject, kit: Any) -> None:
    weight, spec = data.draw(kit.cases())
    stored = quantize(weight, spec)
    assert stored.scale is not None
    before = weight.clone()
    errors = row_errors(weight, stored.codes, stored.scale, spec)
    difference = dequantize(stored.codes, stored.scale, spec) - weight
    assert torch.equal(weight, before)
    assert errors.signal.dtype == errors.noise.dtype == torch.float64
    assert torch.equal(errors.signal, in_order(weight))
    assert torch.equal(errors.noise, in_order(difference))

    height, width = spec.group_shape(*weight.shape)
    each = stored.scale.float().repeat_interleave(height, 0).repeat_interleave(width, 1)
    worst = (difference.abs() / each[: weight.shape[0], : weight.shape[1]]).max()
    assert errors.worst_in_scales == float(worst)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 40) | st.integers(1000, 1050) | st.integers(2040, 5000),
    seed=st.integers(0, 2**32 - 1),
    exponents=st.sampled_from([(-149, 127), (-149, -120), (100, 127), (-5, 5)]),
    cut=st.integers(1, 5),
)
def test_every_width_and_magnitude_is_summed_in_that_order(
    rows: int, columns: int, seed: int, exponents: tuple[int, int], cut: int
) -> None:
    random = np.random.default_rng(seed)
    powers = random.integers(*exponents, (rows, columns))
    block = torch.from_numpy(np.ldexp(random.uniform(-1, 1, (rows, columns)), powers)).float()
    sums = sums_of_squares(block)
    parts = [sums_of_squares(block[top : top + cut]) for top in range(0, rows, cut)]
    assert torch.equal(sums, in_order(block))
    assert torch.equal(sums, torch.cat(parts))
    torch.testing.assert_close(sums, block.double().square().sum(1), rtol=1e-13, atol=0)


def test_many_short_rows_are_summed_in_bounded_steps() -> None:
    block = torch.randn(30_000, 9, generator=torch.Generator().manual_seed(8))
    assert torch.equal(sums_of_squares(block), in_order(block))


def test_a_code_beyond_float32_is_refused(kit: Any) -> None:
    """1.8 of a scale that was given is rounded to 2 of it, which float32 does not hold."""
    weight, scale = torch.tensor([[1.0, 2.0], [1.0, 3.4e38]]), torch.tensor([[1.9e38]])
    spec = kit.spec("int8", "tensor")
    codes = get_format(spec).encode(weight, scale, spec)
    for checked in (True, False):
        with pytest.raises(NonFinite) as refused:
            error.row_errors(weight, codes, scale, get_format(spec), spec, checked=checked)
        assert refused.value.index == (1, 1)


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
