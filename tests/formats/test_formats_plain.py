"""Plain dtypes: rounding to nearest, copies of bits, and what a cast refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.formats import (
    PLAIN,
    NonFinite,
    OutOfRange,
    cast,
    dequantize,
    quantize,
    to_float32,
)
from quantrecipe.schema.schemes import PlainWeight

SIXTEEN = [torch.bfloat16, torch.float16]
NARROW = {"float16": 65504.0, "bfloat16": (2 - 2.0**-7) * 2.0**127}


def patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)


def bits(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("source", SIXTEEN, ids=str)
def test_every_16_bit_pattern_survives_its_own_dtype(source: torch.dtype) -> None:
    every = patterns(source)
    name = next(name for name, dtype in PLAIN.items() if dtype == source)
    copy = cast(every, name)
    assert bits(copy) == bits(every)
    assert copy.data_ptr() != every.data_ptr()


@pytest.mark.parametrize("source", SIXTEEN, ids=str)
@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_every_16_bit_number_survives_a_wider_dtype(source: torch.dtype, wide: Any) -> None:
    every = patterns(source)
    numbers = every[every.isfinite()]
    name = next(name for name, dtype in PLAIN.items() if dtype == source)
    assert bits(cast(cast(numbers, wide), name)) == bits(numbers)
    for poison in every[~every.isfinite()][::37]:
        with pytest.raises(NonFinite) as refused:
            cast(torch.stack([numbers[0], poison]), wide)
        assert refused.value.index == (1,)


@given(values=st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=50))
def test_narrowing_rounds_to_nearest_even(values: list[float], kit: Any) -> None:
    source = np.array(values, dtype=np.float32)
    half = cast(torch.from_numpy(source), "float16")
    assert bits(half) == source.astype(np.float16).tobytes()
    brain = cast(torch.from_numpy(source), "bfloat16")
    assert bits(brain.float()) == kit.oracle.round_bfloat16(source).tobytes()


@given(values=st.lists(st.floats(-60000, 60000), min_size=1, max_size=50))
def test_float64_goes_through_float32(values: list[float], kit: Any) -> None:
    source = np.array(values, dtype=np.float64)
    through = source.astype(np.float32)
    assert bits(cast(torch.from_numpy(source), "float32")) == through.tobytes()
    assert bits(cast(torch.from_numpy(source), "float16")) == through.astype(np.float16).tobytes()
    brain = cast(torch.from_numpy(source), "bfloat16").float()
    assert bits(brain) == kit.oracle.round_bfloat16(through).tobytes()


def test_float64_is_rounded_twice_on_its_way_to_16_bits() -> None:
    above_a_tie = 1 + 2.0**-8 + 2.0**-40
    assert cast(torch.tensor([above_a_tie], dtype=torch.float64), "bfloat16").item() == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_a_number_that_would_overflow_is_refused(dtype: Any, wide: torch.dtype) -> None:
    largest = NARROW[dtype]
    half_step = largest / (2 - (2.0**-10 if dtype == "float16" else 2.0**-7))
    half_step *= 2.0**-11 if dtype == "float16" else 2.0**-8
    fits = torch.tensor([[largest, -largest, (largest + half_step) * (1 - 2.0**-20)]], dtype=wide)
    assert cast(fits, dtype).tolist() == [[largest, -largest, largest]]
    for sign in (1, -1):
        source = torch.zeros(2, 3, dtype=wide)
        source[1, 2] = sign * (largest + half_step)
        with pytest.raises(OutOfRange, match=f"too large for {dtype}") as refused:
            cast(source, dtype)
        assert refused.value.index == (1, 2)


def test_float64_beyond_float32_is_refused() -> None:
    source = torch.tensor([[0.0, 1e300]], dtype=torch.float64)
    for convert in (to_float32, lambda t: cast(t, "bfloat16"), lambda t: cast(t, "float32")):
        with pytest.raises(OutOfRange) as refused:
            convert(source)
        assert refused.value.index == (0, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_cast_is_a_computation_and_a_copy_is_not(value: float) -> None:
    source = torch.tensor([0.0, value, 1.0])
    assert bits(cast(source, "float32")) == bits(source)
    for dtype in ("float64", "float16", "bfloat16"):
        with pytest.raises(NonFinite) as refused:
            cast(source, dtype)
        assert refused.value.index == (1,)


def test_to_float32_leaves_numbers_and_memory_alone() -> None:
    weight, out = torch.randn(3, 4), torch.empty(3, 4)
    assert to_float32(weight) is weight
    assert to_float32(weight, out) is out
    assert torch.equal(out, weight)
    assert to_float32(weight.bfloat16(), out) is out
    assert torch.equal(out, weight.bfloat16().float())
    assert to_float32(weight.double()).dtype == torch.float32


@pytest.mark.parametrize(
    ("source", "out"),
    [
        (torch.ones(2, dtype=torch.int8), None),
        (torch.ones(2).to(torch.float8_e4m3fn), None),
        (torch.ones(2), torch.ones(3, dtype=torch.float16)),
        (torch.ones(2), torch.ones(2)),
    ],
    ids=["int8", "fp8", "shape", "dtype"],
)
def test_misuse_is_named(source: torch.Tensor, out: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"scale|out must be"):
        cast(source, "float16", out)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_plain_specs_quantize_without_a_scale(dtype: Any) -> None:
    spec = PlainWeight(format=dtype)
    stored = quantize(torch.tensor([[0.1, -2.0]]), spec)
    assert stored.scale is None
    assert stored.codes.dtype == PLAIN[dtype]
    back = dequantize(stored.codes, None, spec, torch.float32)
    assert torch.equal(back, stored.codes.float())


def test_an_empty_tensor_casts() -> None:
    assert cast(torch.empty(0, 4), "bfloat16").shape == (0, 4)
