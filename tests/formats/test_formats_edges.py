"""Values at the rims of the formats, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from quantrecipe.formats import (
    FORMATS,
    NonFinite,
    ScaleOutOfRange,
    Workspace,
    dequantize,
    get_format,
    quantize,
)
from quantrecipe.schema.problems import InvalidInput

FORMAT_NAMES = ["int8", "float8_e4m3fn", "float8_e5m2"]
SCALE_DTYPES = ["float32", "float16", "bfloat16"]


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_zeros_have_scale_one(fmt: str, scale_dtype: str, granularity: str, kit: Any) -> None:
    spec = kit.spec(fmt, granularity, scale_dtype)
    stored = quantize(torch.zeros(3, 4), spec)
    assert stored.scale is not None
    assert bool((stored.scale == 1).all())
    assert stored.codes.view(torch.uint8).count_nonzero() == 0
    assert bool((dequantize(stored.codes, stored.scale, spec) == 0).all())


@pytest.mark.parametrize(
    ("scale_dtype", "floor"),
    [("float32", 2.0**-126), ("bfloat16", 2.0**-126), ("float16", 2.0**-14)],
)
@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_scales_stop_at_the_smallest_normal(
    fmt: str, scale_dtype: str, floor: float, kit: Any
) -> None:
    spec = kit.spec(fmt, "channel", scale_dtype)
    largest = get_format(fmt).largest_code
    at, below, above = floor * largest, floor * largest / 1.5, floor * largest * 1.5
    amax = torch.tensor([[at], [below], [above], [floor * 0.5], [2.0**-149]])
    scale = get_format(fmt).scales(amax, spec).double().flatten().tolist()
    assert scale == [floor, floor, 1.5 * floor, floor, floor]


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_subnormal_weights_become_what_the_floor_makes_of_them(fmt: str, kit: Any) -> None:
    weight = torch.tensor([[2.0**-127, -(2.0**-126), 2.0**-149, 0.0]])
    stored = quantize(weight, kit.spec(fmt))
    assert stored.scale is not None
    values = dequantize(stored.codes, stored.scale, kit.spec(fmt)).flatten().tolist()
    half = 0.0 if fmt == "int8" else 2.0**-127
    assert values == [half, -(2.0**-126), 0.0, 0.0]


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "fine"])
def test_non_finite_weights_are_refused_by_index(
    fmt: str, poison: float, granularity: str, kit: Any
) -> None:
    fine = "group" if fmt == "int8" else "block"
    spec = kit.spec(fmt, fine if granularity == "fine" else granularity)
    for row in range(5):
        for column in range(8):
            weight = torch.ones(5, 8)
            weight[row, column] = poison
            weight[4, 7] = math.nan
            with pytest.raises(NonFinite) as refused:
                get_format(fmt).measure(weight, spec)
            assert refused.value.index == (row, column)
    problem = refused.value.at("layers.0.weight", first_row=100)
    assert (problem.kind, problem.tensor) == ("non-finite", "layers.0.weight")
    assert "[104, 7]" in problem.message


@pytest.mark.parametrize(("fmt", "top"), [("float8_e4m3fn", 0x7E), ("float8_e5m2", 0x7B)])
def test_nothing_beyond_the_largest_reaches_the_cast(fmt: str, top: int, kit: Any) -> None:
    largest = get_format(fmt).largest_code
    weight = torch.tensor([[largest * x for x in (1.0, 1.01, 1.2, 4.0, 1e20, -1.2, -1e20)]])
    codes = get_format(fmt).encode(weight, torch.ones(1, 1), kit.spec(fmt))
    assert codes.view(torch.uint8).flatten().tolist() == [top] * 5 + [top | 0x80] * 2


@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "float8_e5m2"])
def test_a_scale_that_was_rounded_down_still_gives_the_largest_code(fmt: str, kit: Any) -> None:
    largest = get_format(fmt).largest_code
    weight = torch.full((1, 3), largest * (1 + 2.0**-8))
    stored = quantize(weight, kit.spec(fmt, "channel", "bfloat16"))
    assert stored.scale is not None
    assert stored.scale.item() == 1
    assert stored.codes.float().tolist() == [[largest] * 3]


def test_int8_codes_stop_at_127(kit: Any) -> None:
    weight = torch.tensor([[127.4, 127.5, 128.0, 1e30, -127.5, -128.0, -1e30, 126.5]])
    codes = get_format("int8").encode(weight, torch.ones(1, 1), kit.spec("int8"))
    assert codes.tolist() == [[127, 127, 127, 127, -127, -127, -127, 126]]


def test_ties_go_to_even(kit: Any) -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5]])
    assert quantize(weight, kit.spec("int8")).codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 64]]


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_the_quotient_is_a_division(fmt: str, kit: Any) -> None:
    """On ties ``w / s`` and ``w * (1 / s)`` give different codes; this is the first."""
    spec, steps = kit.spec(fmt), torch.arange(-253, 254, 2).float()[None, :] / 2
    scale = torch.arange(3, 400).float()[:, None] * 1.2345e-3
    weight = steps * scale
    codes = get_format(fmt).encode(weight, scale, spec)
    by_division = get_format(fmt).encode(weight / scale, torch.ones(len(scale), 1), spec)
    by_reciprocal = get_format(fmt).encode(weight * (1 / scale), torch.ones(len(scale), 1), spec)
    assert torch.equal(codes.view(torch.uint8), by_division.view(torch.uint8))
    assert not torch.equal(codes.view(torch.uint8), by_reciprocal.view(torch.uint8))


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_a_scale_beyond_its_dtype_is_refused(fmt: str, kit: Any) -> None:
    spec = kit.spec(fmt, "channel", "float16")
    amax = torch.tensor([[1.0], [get_format(fmt).largest_code * 65520.0]])
    with pytest.raises(ScaleOutOfRange) as refused:
        get_format(fmt).scales(amax, spec)
    assert refused.value.index == (1, 0)
    amax[1] = get_format(fmt).largest_code * 65519.0
    assert get_format(fmt).scales(amax, spec)[1, 0].item() == 65504


def test_a_source_may_hold_minus_128(kit: Any) -> None:
    codes = torch.tensor([[-128, 127]], dtype=torch.int8)
    assert dequantize(codes, torch.full((1, 1), 0.5), kit.spec("int8")).tolist() == [[-64, 63.5]]


@pytest.mark.parametrize(
    ("fmt", "patterns"),
    [
        ("float8_e4m3fn", [0x7F, 0xFF]),
        ("float8_e5m2", [0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF]),
    ],
)
def test_codes_that_are_no_numbers_are_refused(fmt: str, patterns: list[int], kit: Any) -> None:
    for pattern in patterns:
        raw = torch.full((3, 4), 0xBC, dtype=torch.uint8)
        raw[1, 2] = pattern
        with pytest.raises(NonFinite, match=f"0x{pattern:02x}") as refused:
            dequantize(raw.view(getattr(torch, fmt)), torch.ones(3, 1), kit.spec(fmt))
        assert refused.value.index == (1, 2)


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
@pytest.mark.parametrize("scale", [math.nan, math.inf, 3e38])
def test_scales_that_are_no_numbers_are_refused(fmt: str, scale: float, kit: Any) -> None:
    codes = torch.full((3, 4), 2.0).to(get_format(fmt).code_dtype)
    scales = torch.tensor([[1.0], [scale], [1.0]])
    with pytest.raises(NonFinite) as refused:
        dequantize(codes, scales, kit.spec(fmt))
    assert refused.value.index == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sources_may_have_scales_of_any_float(dtype: torch.dtype, kit: Any) -> None:
    codes = torch.tensor([[3, -5]], dtype=torch.int8)
    values = dequantize(codes, torch.full((1, 1), 0.25, dtype=dtype), kit.spec("int8"))
    assert values.dtype == torch.float32
    assert values.tolist() == [[0.75, -1.25]]


@pytest.mark.parametrize(
    "scale",
    [
        torch.ones(2, 1, dtype=torch.bfloat16),
        torch.ones(2),
        torch.ones(1, 1),
        torch.zeros(2, 1),
        -torch.ones(2, 1),
        torch.full((2, 1), math.nan),
        torch.full((2, 1), math.inf),
    ],
    ids=["dtype", "1-d", "shape", "zero", "negative", "nan", "infinite"],
)
def test_encode_refuses_scales_that_are_not_the_specs(scale: torch.Tensor, kit: Any) -> None:
    with pytest.raises(ValueError, match=r"scales|positive"):
        get_format("int8").encode(torch.ones(2, 3), scale, kit.spec("int8"))


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_preallocated_memory_is_used(fmt: str, kit: Any) -> None:
    encoder, spec, workspace = get_format(fmt), kit.spec(fmt), Workspace()
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    before = weight.clone()
    scale = encoder.scales(encoder.measure(weight, spec), spec)
    codes = torch.empty(4, 6, dtype=encoder.code_dtype)
    scratch = workspace.like(weight).data_ptr()
    assert encoder.encode(weight, scale, spec, codes, workspace=workspace) is codes
    assert workspace.like(weight[:2]).data_ptr() == scratch
    values = torch.empty(4, 6)
    assert encoder.decode(codes, scale, spec, values) is values
    assert torch.equal(weight, before)
    assert workspace.like(torch.empty(9, 9)).shape == (9, 9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f, s: f.measure(torch.ones(3), s), "a weight"),
        (lambda f, s: f.measure(torch.ones(3, 3, dtype=torch.float64), s), "a weight"),
        (lambda f, s: f.measure(torch.ones(0, 3), s), "non-empty"),
        (lambda f, s: f.decode(torch.ones(2, 2), torch.ones(2, 1), s), "int8 codes"),
        (lambda f, s: f.encode(torch.ones(2, 2), torch.ones(2, 1), s, torch.ones(2, 2)), "out"),
    ],
    ids=["1-d", "float64", "empty", "codes", "out"],
)
def test_misuse_is_named(call: Any, words: str, kit: Any) -> None:
    with pytest.raises(ValueError, match=words):
        call(get_format("int8"), kit.spec("int8"))


def test_formats_are_found_by_spec_and_by_name(kit: Any) -> None:
    for name in FORMAT_NAMES:
        assert get_format(kit.spec(name)) is get_format(name) is FORMATS[name]
        assert get_format(name).name == name
    with pytest.raises(InvalidInput, match="Did you mean 'int8'"):
        get_format("int9")


def test_a_shape_that_the_spec_refuses_is_refused(kit: Any) -> None:
    with pytest.raises(InvalidInput, match="no multiple of group_size"):
        quantize(torch.ones(2, 6), kit.spec("int8", "group"))
