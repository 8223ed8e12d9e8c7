"""No stored weight is further from its source than the format's bound, from the stored bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats import dequantize, get_format, quantize

Q = 127
SLACK = 1 + 1e-6
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Worst relative error, half the smallest subnormal, half the top step, largest code.
FLOAT8 = {
    "float8_e4m3fn": (1 / 17, 2.0**-10, 16.0, 448.0),
    "float8_e5m2": (1 / 9, 2.0**-17, 4096.0, 57344.0),
}


def each_scale(scale: Tensor, spec: Any, like: Tensor) -> Tensor:
    """Every element's own stored scale, float64."""
    height, width = spec.group_shape(*like.shape)
    grid = scale.double().repeat_interleave(height, 0).repeat_interleave(width, 1)
    return grid[: like.shape[0], : like.shape[1]]


def int8_bound(weight: Tensor, s: Tensor) -> Tensor:
    return torch.maximum(s / 2, weight.abs() - Q * s) + Q * 2.0**-23 * s


def float8_bound(weight: Tensor, s: Tensor, name: str) -> Tensor:
    relative, underflow, top, largest = FLOAT8[name]
    w = weight.abs()
    inside = torch.maximum(w * relative, s * underflow).minimum(s * top)
    return torch.maximum(inside, w - largest * s) + 2.0**-22 * w + 2.0**-24 * s


@given(data=st.data())
@settings(max_examples=200)
def test_no_error_exceeds_its_bound(data: st.DataObject, kit: Any) -> None:
    weight, spec = data.draw(kit.cases())
    stored = quantize(weight, spec)
    assert stored.scale is not None
    exact = weight.double()
    s = each_scale(stored.scale, spec, weight)
    is_int8 = spec.format == "int8"
    bound = int8_bound(exact, s) if is_int8 else float8_bound(exact, s, spec.format)
    error = (exact - dequantize(stored.codes, stored.scale, spec).double()).abs()

    assert bool((error <= bound * SLACK).all())
    published = get_format(spec).bound(weight, stored.codes, stored.scale, spec)
    assert published.dtype == torch.float64
    torch.testing.assert_close(published, bound, rtol=1e-12, atol=0)


@given(data=st.data())
@settings(max_examples=100)
def test_normal_scales_give_the_plain_bound(data: st.DataObject, kit: Any) -> None:
    """A scale that is the rounded ``amax / largest`` clips too little to show."""
    weight, spec = data.draw(kit.cases(moderate=True))
    stored = quantize(weight, spec)
    assert stored.scale is not None
    s = each_scale(stored.scale, spec, weight)
    exact = weight.double()
    error = (exact - dequantize(stored.codes, stored.scale, spec).double()).abs()
    if spec.format == "int8":
        limit = s * (0.5 + Q * 2.0**-23)
    else:
        relative, underflow, top, _ = FLOAT8[spec.format]
        limit = torch.maximum(exact.abs() * relative, s * underflow)
        limit = limit.minimum(top * s) + 2.0**-22 * exact.abs()
    assert bool((error <= limit * SLACK).all())


@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_the_bound_is_reached(fmt: str, kit: Any) -> None:
    """A bound that nothing comes near would show nothing."""
    largest = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}[fmt]
    weight = torch.arange(-4000, 4001).double().div(64).float()[None, :]
    weight[0, 0] = largest
    spec = kit.spec(fmt)
    stored = quantize(weight, spec)
    assert stored.scale is not None
    error = (weight - dequantize(stored.codes, stored.scale, spec)).abs().double()
    ratio = error / get_format(spec).bound(weight, stored.codes, stored.scale, spec)
    assert float(ratio.max()) > 0.999


@given(data=st.data(), scale_dtype=st.sampled_from(["float16", "bfloat16"]))
def test_codes_from_the_unrounded_scale_are_another_thing(
    data: st.DataObject, scale_dtype: str, kit: Any
) -> None:
    """The bug class: codes from ``amax / 127``, read back with the rounded scale."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    values = np.random.default_rng(seed).uniform(-1, 1, (8, 512)).astype(np.float32)
    weight, spec = torch.from_numpy(values), kit.spec("int8", "channel", scale_dtype)
    stored = quantize(weight, spec)
    assert stored.scale is not None
    s = stored.scale.double()
    wrong = (weight / (weight.abs().amax(1, keepdim=True) / Q)).round().clamp(-Q, Q)
    wrong_error = (weight.double() - wrong.double() * s).abs()
    right_error = (weight.double() - stored.codes.double() * s).abs()

    unit = UNIT[scale_dtype]
    assert bool((wrong_error <= s * (0.5 + Q * unit + Q * 2.0**-23) * SLACK).all())
    assert bool((right_error <= s * (0.5 + Q * 2.0**-23) * SLACK).all())
    assert bool((wrong_error > s * (0.5 + Q * 2.0**-23)).any())


@given(data=st.data())
def test_dequantized_to_bfloat16(data: st.DataObject, kit: Any) -> None:
    weight, spec = data.draw(kit.cases(moderate=True))
    spec = kit.spec("int8", "channel", spec.scale_dtype)
    stored = quantize(weight, spec)
    assert stored.scale is not None
    read = dequantize(stored.codes, stored.scale, spec, "bfloat16")
    assert read.dtype == torch.bfloat16
    error = (weight.double() - read.double()).abs()
    assert bool((error <= stored.scale.double() * (0.5 + Q * 2.0**-8) * SLACK).all())


@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("factor", [0.01, 1.0, 50.0])
def test_the_bound_holds_for_scales_from_elsewhere(fmt: str, factor: float, kit: Any) -> None:
    """A scale too small clips, one too large coarsens; the bound says how much."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    spec = kit.spec(fmt)
    encoder = get_format(spec)
    scale = encoder.scales(encoder.measure(weight, spec), spec) * factor
    codes = encoder.encode(weight, scale, spec)
    error = (weight.double() - encoder.decode(codes, scale, spec).double()).abs()
    assert bool((error <= encoder.bound(weight, codes, scale, spec)).all())
