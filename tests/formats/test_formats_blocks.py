"""mxfp8, mxfp4, nvfp4 and llm_int8: definitions, bounds, rims, and what every weight shows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats import (
    FORMATS,
    NonFinite,
    Quantized,
    ScaleOutOfRange,
    choose_two_levels,
    dequantize,
    effective_scales,
    get_format,
    quantize,
    row_errors,
)
from quantrecipe.formats.fp4 import LEVELS
from quantrecipe.schema.schemes import LlmInt8, MxFp4, MxFp8, NvFp4, OcpFloor, ScaledWeight

SLACK = 1 + 1e-6
FLOOR = OcpFloor(kind="ocp-floor")
MXFP8, MXFP4 = (
    MxFp8(format="mxfp8", granularity="group"),
    MxFp4(format="mxfp4", granularity="group"),
)
MXFP8_FLOOR, MXFP4_FLOOR = (
    MxFp8(format="mxfp8", granularity="group", quantizer=FLOOR),
    MxFp4(format="mxfp4", granularity="group", quantizer=FLOOR),
)
NVFP4 = NvFp4(format="nvfp4", granularity="group")
LLM_INT8 = LlmInt8(format="llm_int8", granularity="channel")
MX = (MXFP8, MXFP8_FLOOR, MXFP4, MXFP4_FLOOR)
SPECS = (*MX, NVFP4, LLM_INT8)
NAMES = ("mxfp8", "mxfp4", "nvfp4", "llm_int8")
GOLDEN = Path(__file__).with_name("golden") / "blocks.json"


def named(spec: ScaledWeight) -> str:
    return spec.format + ("-floor" if spec.quantizer == FLOOR else "")


each_spec = pytest.mark.parametrize("spec", SPECS, ids=named)
each_mx = pytest.mark.parametrize("spec", MX, ids=named)


def gaussian(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoded(stored: Quantized, spec: ScaledWeight) -> Tensor:
    return dequantize(stored.codes, stored.scale, spec)


def bound(weight: Tensor, stored: Quantized, spec: ScaledWeight) -> Tensor:
    assert stored.scale is not None
    return get_format(spec).bound(weight, stored.codes, stored.scale, spec)


def drawn(data: st.DataObject, kit: Any) -> tuple[Tensor, ScaledWeight]:
    """Any weight that the format has scales for."""
    weight, spec = data.draw(kit.cases(formats=NAMES, two_levels=True))
    # What llm_int8 multiplies by 127 before it divides.
    limit = 2.0**121 if spec.format == "llm_int8" else 2.0**127
    return weight.clamp(-limit, limit), spec


def bits(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.contiguous().view(torch.uint8)


def in_groups(tensor: Tensor, spec: ScaledWeight) -> Tensor:
    """``[rows, groups, numbers]``."""
    return tensor.reshape(len(tensor), -1, spec.group_shape(*tensor.shape)[1])


def defined(weight: Tensor, spec: ScaledWeight, oracle: Any) -> tuple[Any, Any, Any]:
    """Scales, codes and values as NumPy computes them from the definitions."""
    w = weight.numpy()
    if spec.format == "nvfp4":
        _, _, scale, codes, values = oracle.nvfp4(w)
    elif spec.format == "llm_int8":
        scale, codes, values = oracle.llm_int8(w)
    else:
        scale, codes, values = oracle.mx(w, spec.format, spec.quantizer == FLOOR)
    return scale.reshape(len(w), -1), codes.reshape(w.shape), values.reshape(w.shape)


@given(data=st.data())
@settings(max_examples=60)
def test_agrees_with_numpy(data: st.DataObject, kit: Any) -> None:
    """The definitions once more, in another library."""
    weight, spec = drawn(data, kit)
    stored = quantize(weight, spec)
    scale, codes, values = defined(weight, spec, kit.oracle)
    assert stored.scale is not None
    assert np.array_equal(stored.scale.float().numpy(), scale)
    assert np.array_equal(bits(stored.codes).numpy(), codes)
    assert np.array_equal(decoded(stored, spec).numpy(), values)


@given(data=st.data())
@settings(max_examples=100)
def test_no_error_exceeds_its_bound(data: st.DataObject, kit: Any) -> None:
    weight, spec = drawn(data, kit)
    stored = quantize(weight, spec)
    assert stored.scale is not None
    error = (weight.double() - decoded(stored, spec).double()).abs()
    assert bool((error <= bound(weight, stored, spec) * SLACK).all())
    # From the largest number of a group and its scale as stored: the constants of the formats.
    worst, most = in_groups(error, spec).amax(2), in_groups(weight.abs(), spec).double().amax(2)
    s = stored.scale.double()
    if spec.format == "nvfp4":
        limit = torch.maximum(s, most - 6 * s)
        assert stored.two_levels is not None
        normal = stored.two_levels.scale.float() >= 2.0**-6
        limit = torch.where(normal, torch.minimum(limit, most * 3 / 17), limit)
    elif spec.format == "llm_int8":
        limit = s / 254 + torch.where(s < 2.0**-120, most, 0)
    else:
        share = {"mxfp8": (17, 8), "mxfp4": (5, 4)}[spec.format][spec.quantizer == FLOOR]
        # Below the smallest scale, half of a step is what there is.
        limit = torch.maximum(most / share, s * {"mxfp8": 2.0**-10, "mxfp4": 0.25}[spec.format])
    assert bool((worst <= limit * SLACK + most * 2.0**-21 + 2.0**-148).all())


@each_spec
def test_the_bound_is_reached(spec: ScaledWeight) -> None:
    """A bound that nothing comes near would show nothing."""
    weight = gaussian(400, 64, seed=5)
    stored = quantize(weight, spec)
    ratio = (weight - decoded(stored, spec)).abs().double() / bound(weight, stored, spec)
    assert float(ratio.max()) > 0.995


@pytest.mark.parametrize("factor", [0.03125, 1.0, 32.0])
@each_spec
def test_the_bound_holds_for_scales_from_elsewhere(spec: ScaledWeight, factor: float) -> None:
    weight, fmt = gaussian(64, 64, seed=3), get_format(spec)
    scale = fmt.scales(fmt.measure(weight, spec), spec)
    scale = (scale.float() * factor).to(scale.dtype)
    codes = fmt.encode(weight, scale, spec)
    error = (weight.double() - fmt.decode(codes, scale, spec).double()).abs()
    assert bool((error <= fmt.bound(weight, codes, scale, spec)).all())


@given(data=st.data())
@settings(max_examples=60)
def test_requantizing_reproduces_the_codes(data: st.DataObject, kit: Any) -> None:
    weight, spec = data.draw(kit.cases(formats=NAMES, moderate=True, two_levels=True))
    stored = quantize(weight, spec)
    assert stored.scale is not None
    again = get_format(spec).encode(decoded(stored, spec), stored.scale, spec)
    assert torch.equal(bits(again), bits(stored.codes))


@given(data=st.data(), exponent=st.integers(-4, 4))
@settings(max_examples=60)
def test_powers_of_two_move_to_the_scale(data: st.DataObject, exponent: int, kit: Any) -> None:
    weight, spec = data.draw(kit.cases(formats=NAMES, moderate=True, two_levels=True))
    stored, scaled = quantize(weight, spec), quantize(weight * 2.0**exponent, spec)
    assert stored.scale is not None
    assert scaled.scale is not None
    assert torch.equal(bits(scaled.codes), bits(stored.codes))
    assert torch.equal(scaled.scale.float(), stored.scale.float() * 2.0**exponent)
    if stored.two_levels is not None and scaled.two_levels is not None:
        assert torch.equal(bits(scaled.two_levels.scale), bits(stored.two_levels.scale))


@given(data=st.data())
@settings(max_examples=60)
def test_signs_are_symmetric(data: st.DataObject, kit: Any) -> None:
    weight, spec = drawn(data, kit)
    plus, minus = quantize(weight, spec), quantize(-weight, spec)
    assert torch.equal(bits(plus.scale), bits(minus.scale))
    assert torch.equal(decoded(plus, spec), -decoded(minus, spec))
    if spec.format.startswith("mx"):
        sign = 8 if spec.format == "mxfp4" else 0x80
        assert torch.equal(bits(plus.codes), bits(minus.codes) ^ sign)


@given(data=st.data())
@settings(max_examples=40)
def test_rows_may_be_permuted(data: st.DataObject, kit: Any) -> None:
    weight, spec = drawn(data, kit)
    order = torch.tensor(data.draw(st.permutations(range(len(weight)))))
    stored, permuted = quantize(weight, spec), quantize(weight[order], spec)
    assert stored.scale is not None
    assert torch.equal(bits(permuted.codes), bits(stored.codes[order]))
    assert torch.equal(bits(permuted.scale), bits(bits(stored.scale)[order]))


@given(data=st.data())
@settings(max_examples=40)
def test_a_group_does_not_see_the_others(data: st.DataObject, kit: Any) -> None:
    weight, spec = data.draw(kit.cases(formats=("mxfp8", "mxfp4", "llm_int8"), moderate=True))
    width = spec.group_shape(*weight.shape)[1]
    row = data.draw(st.integers(0, weight.shape[0] - 1))
    group = data.draw(st.integers(0, weight.shape[1] // width - 1))
    inside = torch.zeros(weight.shape, dtype=torch.bool)
    inside[row, group * width : (group + 1) * width] = True
    stored = quantize(weight, spec)
    changed = quantize(torch.where(inside, weight * 3, weight), spec)
    assert torch.equal(bits(changed.codes)[~inside], bits(stored.codes)[~inside])
    assert stored.scale is not None
    assert changed.scale is not None
    moved = (changed.scale.float() != stored.scale.float()).nonzero().tolist()
    assert moved == [[row, group]]


@given(data=st.data(), size=st.integers(1, 5))
@settings(max_examples=40)
def test_cuts_make_no_difference(data: st.DataObject, size: int, kit: Any) -> None:
    weight, spec = drawn(data, kit)
    fmt, stored = get_format(spec), quantize(weight, spec)
    cuts = [slice(top, top + size) for top in range(0, len(weight), size)]
    maxima = torch.cat([fmt.measure(weight[cut], spec) for cut in cuts])
    if spec.has_two_levels:
        chosen, scale = choose_two_levels(maxima, spec)
        assert torch.equal(bits(effective_scales(chosen, spec)), bits(stored.scale))
    else:
        scale = fmt.scales(maxima, spec)
    codes = torch.cat([bits(fmt.encode(weight[cut], scale[cut], spec)) for cut in cuts])
    assert torch.equal(codes, bits(stored.codes))
    assert torch.equal(bits(scale), bits(stored.scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [MXFP8, MXFP4], ids=named)
def test_every_16_bit_value_has_the_nearest_code(
    spec: ScaledWeight, dtype: torch.dtype, kit: Any
) -> None:
    """All 65,536 of them, against scales of 1/4, 1 and 8."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    numbers = torch.nan_to_num(every, 0.0, 0.0, 0.0).view(-1, 32)
    kind = kit.oracle.FLOAT8["float8_e4m3fn"] if spec.format == "mxfp8" else kit.oracle.E2M1
    for scale in (0.25, 1.0, 8.0):
        grid = torch.full((len(numbers), 1), scale).to(torch.float8_e8m0fnu)
        codes = get_format(spec).encode(numbers, grid, spec)
        sign = 0x80 if spec.format == "mxfp8" else 8
        expected = kit.oracle.round_float8(numbers.double().numpy() / scale, kind, sign)
        assert np.array_equal(bits(codes).numpy(), expected)


@each_mx
def test_every_bfloat16_maximum_has_its_power(spec: ScaledWeight, kit: Any) -> None:
    amax = torch.arange(0x7F80, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    # And the float32 numbers on either side, which no bfloat16 shows.
    near = torch.cat([amax, torch.nextafter(amax, amax + 1), torch.nextafter(amax, amax * 0)])
    found = get_format(spec).scales(near[None], spec).float()[0]
    largest, floor = get_format(spec).largest_code, spec.quantizer == FLOOR
    expected = [kit.oracle.power_of_two(number, largest, floor) for number in near.tolist()]
    assert found.tolist() == expected
    if not floor:
        assert bool((near.double() <= found.double() * largest).all())


def test_every_fp8_block_scale_is_reached_and_read() -> None:
    """126 magnitudes of e4m3 above 0, from a largest block of 448 scales of 6."""
    codes = torch.arange(127, dtype=torch.uint8)
    amax = (codes.view(torch.float8_e4m3fn).float() * 6)[None]
    stored, grid = choose_two_levels(amax, NVFP4)
    assert stored.second.tolist() == [1.0]
    assert torch.equal(bits(stored.scale)[0], codes)
    assert torch.equal(grid, amax / 6)


def test_fp4_levels_are_those_of_e2m1(kit: Any) -> None:
    magnitudes = kit.oracle.E2M1.values.tolist()
    assert list(LEVELS) == magnitudes + [-magnitude for magnitude in magnitudes]
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)[None]
    scale = torch.ones(1, 1).to(torch.float8_e8m0fnu)
    values = dequantize(codes, scale, MXFP4)
    assert values[0, :16].tolist() == list(LEVELS)
    assert math.copysign(1, values[0, 8].item()) == -1
    assert torch.equal(get_format(MXFP4).encode(values, scale, MXFP4), codes)


def test_fp4_ties_go_to_even_codes() -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5, -0.25, -5.0, -1e30, -0.0]
    weight = torch.tensor([ties + [0.0] * 20])
    codes = get_format(MXFP4).encode(weight, torch.ones(1, 1).to(torch.float8_e8m0fnu), MXFP4)
    assert codes[0, :12].tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 8, 14, 15, 8]


@pytest.mark.parametrize(
    ("spec", "scale"),
    [*((spec, 2.0**-127) for spec in MX), (NVFP4, 0.0), (LLM_INT8, 0.0)],
    ids=lambda value: named(value) if isinstance(value, ScaledWeight) else None,
)
def test_zeros_are_exact(spec: ScaledWeight, scale: float) -> None:
    weight = gaussian(3, 64)
    weight[1] = 0
    stored = quantize(weight, spec)
    assert stored.scale is not None
    assert bool((stored.scale[1].float() == scale).all())
    assert bool((bits(stored.codes)[1] == 0).all())
    assert bool((decoded(stored, spec)[1] == 0).all())
    nothing = quantize(torch.zeros(2, 64), spec)
    assert bool((decoded(nothing, spec) == 0).all())
    if nothing.two_levels is not None:
        assert nothing.two_levels.second.tolist() == [1.0]


@pytest.mark.parametrize("exponent", [-149, -140, -130, -121, -100])
@each_spec
def test_subnormal_weights_have_codes(spec: ScaledWeight, exponent: int) -> None:
    weight = gaussian(4, 64, seed=2) * 2.0**exponent
    stored = quantize(weight, spec)
    error = (weight - decoded(stored, spec)).abs().double()
    assert bool((error <= bound(weight, stored, spec)).all())
    assert not row_errors(weight, stored.codes, stored.scale, spec).worst_in_scales > 1e30  # type: ignore[arg-type]


def test_a_block_beside_a_huge_one_has_scale_and_codes_0() -> None:
    weight = torch.full((1, 32), -1e-3)
    weight[0, 16:] = 1e4
    stored = quantize(weight, NVFP4)
    assert stored.two_levels is not None
    assert bits(stored.two_levels.scale).tolist() == [[0, 0x7E]]
    assert stored.codes.tolist() == [[0] * 16 + [7] * 16]
    assert bool((bound(weight, stored, NVFP4)[0, :16] >= 1e-3).all())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@each_spec
def test_what_is_no_number_is_refused(spec: ScaledWeight, poison: float) -> None:
    weight = torch.ones(3, 64)
    weight[1, 17] = poison
    with pytest.raises(NonFinite) as refused:
        quantize(weight, spec)
    assert refused.value.index == (1, 17)


@each_mx
def test_an_exponent_that_is_no_number_is_refused(spec: ScaledWeight) -> None:
    stored = quantize(torch.ones(3, 64), spec)
    bits(stored.scale)[2, 1] = 255
    with pytest.raises(NonFinite) as refused:
        decoded(stored, spec)
    assert refused.value.index == (2, 32)
    with pytest.raises(ValueError, match="positive and finite"):
        get_format(spec).encode(torch.ones(3, 64), stored.scale, spec)  # type: ignore[arg-type]


@each_mx
def test_every_other_exponent_is_read(spec: ScaledWeight) -> None:
    """Codes of 1 times 2^-127 to 2^127."""
    one = {"mxfp8": 0x38, "mxfp4": 2}[spec.format]
    codes = torch.full((255, 32), one, dtype=torch.uint8).view(get_format(spec).code_dtype)
    scale = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu)[:, None]
    values = dequantize(codes, scale, spec)[:, 0].tolist()
    assert values == [2.0 ** (code - 127) for code in range(255)]


def test_an_fp8_scale_that_is_no_number_is_refused() -> None:
    stored = quantize(torch.ones(2, 64), NVFP4)
    assert stored.two_levels is not None
    bits(stored.two_levels.scale)[1, 2] = 0xFF
    with pytest.raises(NonFinite) as refused:
        dequantize(stored.codes, effective_scales(stored.two_levels, NVFP4), NVFP4)
    assert refused.value.index == (1, 32)


@pytest.mark.parametrize("spec", [MXFP4, NVFP4], ids=named)
def test_a_code_beyond_15_is_refused(spec: ScaledWeight) -> None:
    stored = quantize(torch.ones(3, 64), spec)
    stored.codes[2, 5] = 16
    with pytest.raises(NonFinite, match="code 0x10") as refused:
        decoded(stored, spec)
    assert refused.value.index == (2, 5)


@each_spec
def test_levels_times_scales_are_the_numbers(spec: ScaledWeight) -> None:
    weight = gaussian(5, 64, seed=4)
    stored, group = quantize(weight, spec), spec.group_shape(5, 64)
    assert stored.scale is not None
    levels = get_format(spec).levels(stored.codes, None, group).float()
    product = levels * stored.scale.float().repeat_interleave(group[1], 1)
    # llm_int8 multiplies by 1 / 127 last, as bitsandbytes does.
    ulps = 2.0**-22 if spec.format == "llm_int8" else 0.0
    torch.testing.assert_close(product, decoded(stored, spec), rtol=ulps, atol=0)


def test_an_int8_source_may_hold_minus_128() -> None:
    codes = torch.tensor([[-128, 127]], dtype=torch.int8)
    values = dequantize(codes, torch.full((1, 1), 127.0), LLM_INT8)
    assert values.tolist() == [[-128.0, 127.0]]


def test_llm_int8_refuses_what_127_times_is_beyond_float32() -> None:
    weight = torch.ones(3, 2)
    weight[1, 0] = -2.7e36
    with pytest.raises(ScaleOutOfRange, match=r"\[1, 0\]") as refused:
        quantize(weight, LLM_INT8)
    assert refused.value.index == (1, 0)
    codes = torch.tensor([[0, 1, 127]], dtype=torch.int8)
    with pytest.raises(NonFinite) as refused_read:
        dequantize(codes, torch.full((1, 1), 2.7e36), LLM_INT8)
    assert refused_read.value.index == (0, 2)
    assert bool(dequantize(codes[:, :2], torch.full((1, 1), 2.7e36), LLM_INT8).isfinite().all())


@each_spec
def test_grids_of_another_dtype_are_refused(spec: ScaledWeight) -> None:
    wrong = torch.ones(spec.scale_grid(2, 64), dtype=torch.float16)
    with pytest.raises(ValueError, match=f"scales are given as {spec.grid_dtype}"):
        get_format(spec).encode(torch.ones(2, 64), wrong, spec)


def test_formats_are_found_by_name() -> None:
    for spec in SPECS:
        assert get_format(spec) is FORMATS[spec.format]
        assert str(get_format(spec).code_dtype) == f"torch.{spec.code_dtype}"


@pytest.mark.parametrize("number", range(6))
def test_golden_bytes(number: int, kit: Any) -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))
    case, shape = golden["cases"][number], golden["shape"]
    weight = torch.from_numpy(
        np.frombuffer(bytes.fromhex(golden["weight"]), "<f4").reshape(shape).copy()
    )
    spec = kit.read_spec(case["spec"])
    assert spec == SPECS[number]
    stored = quantize(weight, spec)
    assert bits(stored.codes).numpy().tobytes().hex() == case["codes"]
    scale = stored.scale if stored.two_levels is None else stored.two_levels.scale
    assert bits(scale).numpy().tobytes().hex() == case["scale"]
    if stored.two_levels is not None:
        assert bits(stored.two_levels.second).numpy().tobytes().hex() == case["second"]
    assert decoded(stored, spec).numpy().tobytes().hex() == case["decoded"]
