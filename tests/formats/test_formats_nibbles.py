"""int4 and nf4: codes of 4 bits, zero points, and the bits of bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats import (
    NonFinite,
    Quantized,
    ScaleOutOfRange,
    dequantize,
    get_format,
    quantize,
)
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.nf4 import LEVELS
from quantrecipe.formats.proof import block_proof
from quantrecipe.formats.transform import block_transform
from quantrecipe.schema.schemes import ClipSearch, Int4Group, Nf4, PlainWeight, ScaledWeight
from quantrecipe.testing.strategies import weights

SLACK = 1 + 1e-6
FLOAT32 = PlainWeight(format="float32")
NF4 = Nf4(format="nf4", granularity="block", block_size=64)
GOLDEN = Path(__file__).with_name("golden") / "nibbles.json"
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def int4(symmetric: bool, scale_dtype: Any = "float32", group_size: int = 4) -> Int4Group:
    return Int4Group(
        format="int4",
        granularity="group",
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )


SPECS = [
    *(int4(symmetric, dtype) for symmetric in (True, False) for dtype in UNIT),
    NF4,
]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.format}-{s.scale_dtype}")


def decoded(stored: Quantized, spec: ScaledWeight) -> Tensor:
    return dequantize(stored.codes, stored.scale, spec, zero_point=stored.zero_point)


def bound(weight: Tensor, stored: Quantized, spec: ScaledWeight) -> Tensor:
    assert stored.scale is not None
    return get_format(spec).bound(
        weight, stored.codes, stored.scale, spec, zero_point=stored.zero_point
    )


def spread(grid: Tensor | None, spec: ScaledWeight, like: Tensor) -> Tensor:
    """Every element's own scale or zero point, float64."""
    assert grid is not None
    return grid.double().repeat_interleave(spec.group_shape(*like.shape)[1], 1)


@given(data=st.data())
@settings(max_examples=60)
def test_agrees_with_numpy(data: st.DataObject, kit: Any) -> None:
    """The definitions once more, in another library."""
    weight, spec = data.draw(kit.cases(formats=("int4", "nf4")))
    assume(not spec.has_two_levels)
    try:
        stored = quantize(weight, spec)
    except ScaleOutOfRange:
        return
    assert stored.scale is not None
    width = spec.group_shape(*weight.shape)[1]
    w = weight.numpy().reshape(len(weight), -1, width)
    s = stored.scale.float().numpy()[:, :, None]
    if spec.format == "nf4":
        assert np.array_equal(s[:, :, 0], np.abs(w).max(2))
        levels = np.array(LEVELS, np.float32)
        between = (levels[:-1] + levels[1:]) / np.float32(2)
        ratio = w * (np.float32(1) / np.maximum(s, np.float32(1e-38)))
        codes = (ratio[..., None] > between).sum(-1)
    elif spec.has_zero_points:
        low, high = np.minimum(w.min(2), 0), np.maximum(w.max(2), 0)
        assert stored.zero_point is not None
        zero = stored.zero_point.numpy()[:, :, None]
        assert np.array_equal(zero[:, :, 0], np.clip(np.rint(-low / s[:, :, 0]), 0, 15))
        assert bool((s[:, :, 0] == 1)[high == low].all())
        codes = np.clip(np.rint(w / s) + zero, 0, 15)
    else:
        codes = np.clip(np.rint(w / s), -7, 7) + 8
    assert np.array_equal(stored.codes.numpy().reshape(codes.shape), codes)
    zeros: Any = 8
    if stored.zero_point is not None:
        zeros = stored.zero_point.numpy()[:, :, None].astype(int)
    level = (
        np.array(LEVELS, np.float32)[codes]
        if spec.format == "nf4"
        else (codes - zeros).astype(np.float32)
    )
    assert np.array_equal(decoded(stored, spec).numpy().reshape(w.shape), level * s)


@given(data=st.data())
@settings(max_examples=80)
def test_no_error_exceeds_its_bound(data: st.DataObject, kit: Any) -> None:
    weight, spec = data.draw(kit.cases(formats=("int4", "nf4")))
    assume(not spec.has_two_levels)
    try:
        stored = quantize(weight, spec)
    except ScaleOutOfRange:
        assert float(weight.abs().max()) > 15 * 65504 / 2 or spec.scale_dtype != "float16"
        return
    exact, s = weight.double(), spread(stored.scale, spec, weight)
    error = (exact - decoded(stored, spec).double()).abs()
    assert bool((error <= bound(weight, stored, spec) * SLACK).all())
    if spec.format == "nf4":
        normal = s >= 1e-38
        limit = torch.where(weight < 0, 0.1519036 * s, 0.1385216 * s) * (1 + 1e-5)
    elif spec.has_zero_points:
        normal = s > torch.finfo(getattr(torch, spec.scale_dtype)).smallest_normal
        limit = s * (0.5 + 15 * UNIT[spec.scale_dtype]) + 2.0**-20 * s
    else:
        normal = s > torch.finfo(getattr(torch, spec.scale_dtype)).smallest_normal
        limit = s * (0.5 + 7 * UNIT[spec.scale_dtype]) + 2.0**-20 * s
    assert bool((error <= limit * SLACK)[normal].all())


@each_spec
def test_the_bound_is_reached(spec: ScaledWeight) -> None:
    """A bound that nothing comes near would show nothing."""
    weight = torch.linspace(-1, 1, 64 * 4001).view(4001, 64)
    weight[:, 0], weight[:, 1] = -1, 1
    if isinstance(spec, Int4Group):
        spec = spec.model_copy(update={"group_size": 64})
    stored = quantize(weight, spec)
    ratio = (weight - decoded(stored, spec)).abs().double() / bound(weight, stored, spec)
    assert float(ratio.max()) > 0.99


@pytest.mark.parametrize("factor", [0.01, 1.0, 50.0])
@each_spec
def test_the_bound_holds_for_scales_from_elsewhere(spec: ScaledWeight, factor: float) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    fmt = get_format(spec)
    amax = fmt.measure(weight, spec)
    scale = (fmt.scales(amax, spec).float() * factor).to(fmt.scales(amax, spec).dtype)
    zero_point = fmt.zero_points(amax, scale, spec)
    codes = fmt.encode(weight, scale, spec, zero_point=zero_point)
    stored = Quantized(codes, scale, zero_point)
    error = (weight.double() - decoded(stored, spec).double()).abs()
    assert bool((error <= bound(weight, stored, spec)).all())


@given(data=st.data())
@settings(max_examples=30)
def test_requantizing_reproduces_the_codes(data: st.DataObject, kit: Any) -> None:
    weight, spec = data.draw(kit.cases(formats=("int4", "nf4"), moderate=True))
    assume(not spec.has_two_levels)
    stored = quantize(weight, spec)
    assert stored.scale is not None
    again = get_format(spec).encode(
        decoded(stored, spec), stored.scale, spec, zero_point=stored.zero_point
    )
    assert torch.equal(again, stored.codes)


@given(data=st.data(), exponent=st.integers(-4, 4))
@settings(max_examples=40)
def test_powers_of_two_move_to_the_scale(data: st.DataObject, exponent: int, kit: Any) -> None:
    weight, spec = data.draw(kit.cases(formats=("int4", "nf4"), moderate=True))
    assume(not spec.has_two_levels)
    stored, scaled = quantize(weight, spec), quantize(weight * 2.0**exponent, spec)
    assert stored.scale is not None
    assert scaled.scale is not None
    assert torch.equal(scaled.codes, stored.codes)
    assert torch.equal(scaled.scale, stored.scale * 2.0**exponent)
    if stored.zero_point is not None:
        assert scaled.zero_point is not None
        assert torch.equal(scaled.zero_point, stored.zero_point)


@given(data=st.data(), step=st.integers(1, 5))
@settings(max_examples=30)
def test_cuts_make_no_difference(data: st.DataObject, step: int, kit: Any) -> None:
    """The converter's step and the auditor's, block by block, from an int4 source too."""
    weight, spec = data.draw(kit.cases(formats=("int4", "nf4"), moderate=True))
    assume(not spec.has_two_levels)
    source: Any = FLOAT32
    codes_in, scales_in, zeros_in = weight, None, None
    if isinstance(spec, Int4Group) and data.draw(st.booleans()):
        source = int4(data.draw(st.booleans()))
        first = quantize(weight, source)
        codes_in, scales_in, zeros_in = first.codes, first.scale, first.zero_point
        weight = decoded(first, source)
    stored = quantize(weight, spec)
    transform, proof = block_transform(source, spec), block_proof(source, spec)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        codes = torch.empty_like(stored.codes[rows])
        assert stored.scale is not None
        scale = torch.empty_like(stored.scale[rows])
        zeros = None if stored.zero_point is None else torch.empty_like(stored.zero_point[rows])
        given = SourceBlock(
            codes_in[rows],
            None if scales_in is None else scales_in[rows],
            None if zeros_in is None else zeros_in[rows],
        )
        errors = transform(given, TargetBlock(codes, scale, zeros))
        assert torch.equal(codes, stored.codes[rows])
        assert torch.equal(scale, stored.scale[rows])
        if zeros is not None and stored.zero_point is not None:
            assert torch.equal(zeros, stored.zero_point[rows])
        found = proof(given, TargetBlock(codes, scale, zeros))
        assert found.broken == 0
        assert found.errors.worst_in_scales == errors.worst_in_scales
        assert torch.equal(found.errors.noise, errors.noise)


@each_spec
def test_a_search_is_no_worse_and_keeps_the_bound(spec: ScaledWeight) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(8))
    weight[2] = 0
    searching = spec.model_copy(update={"quantizer": ClipSearch(kind="clip-search")})
    plain, found = quantize(weight, spec), quantize(weight, searching)
    off = (decoded(found, searching) - weight).double()
    assert bool((off.abs() <= bound(weight, found, searching)).all())
    width = spec.group_shape(*weight.shape)[1]
    errors = [
        (decoded(stored, spec) - weight).double().square().view(6, -1, width).sum(-1)
        for stored in (found, plain)
    ]
    assert bool((errors[0] <= errors[1] + 1e-12).all())
    assert float(errors[0].sum()) < 0.97 * float(errors[1].sum())


@each_spec
def test_groups_of_zeros_are_exact(spec: ScaledWeight) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    weight[1] = 0
    stored = quantize(weight, spec)
    assert stored.scale is not None
    assert bool((stored.scale[1] == (0 if spec.format == "nf4" else 1)).all())
    assert bool((decoded(stored, spec)[1] == 0).all())
    codes = {"nf4": 7, "int4": 0 if spec.has_zero_points else 8}
    assert bool((stored.codes[1] == codes[spec.format]).all())


@pytest.mark.parametrize("sign", [1, -1])
def test_the_range_of_a_group_includes_zero(sign: int) -> None:
    """A group far from zero with a scale of its spread alone would have codes for nothing else."""
    spec = int4(False, "bfloat16")
    weight = sign * torch.tensor([[1000.0, 1001.0, 1002.0, 1003.0]])
    stored = quantize(weight, spec)
    assert stored.zero_point is not None
    assert stored.zero_point.tolist() == [[0 if sign > 0 else 15]]
    assert float((weight - decoded(stored, spec)).abs().max()) < 1003 / 15 * 0.56


@each_spec
def test_subnormal_weights_have_codes(spec: ScaledWeight) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * 1e-41
    stored = quantize(weight, spec)
    assert stored.scale is not None
    error = (weight - decoded(stored, spec)).abs().double()
    assert bool((error <= bound(weight, stored, spec)).all())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@each_spec
def test_what_is_no_number_is_refused(spec: ScaledWeight, poison: float) -> None:
    weight = torch.ones(3, 64)
    weight[1, 17] = poison
    with pytest.raises(NonFinite) as refused:
        quantize(weight, spec)
    assert refused.value.index == (1, 17)


@each_spec
def test_a_code_beyond_15_is_refused(spec: ScaledWeight) -> None:
    stored = quantize(torch.ones(3, 64), spec)
    stored.codes[2, 5] = 16
    with pytest.raises(NonFinite, match="code 0x10") as refused:
        decoded(stored, spec)
    assert refused.value.index == (2, 5)


def test_zero_points_are_asked_for_and_only_where_there_are_any() -> None:
    stored = quantize(torch.ones(1, 4), int4(False))
    with pytest.raises(ValueError, match="need zero points"):
        dequantize(stored.codes, stored.scale, int4(False))
    with pytest.raises(ValueError, match="have no zero points"):
        dequantize(stored.codes, stored.scale, int4(True), zero_point=stored.zero_point)
    with pytest.raises(ValueError, match=r"zero points \[1, 1\] of uint8"):
        dequantize(stored.codes, stored.scale, int4(False), zero_point=torch.zeros(1, 1))


@each_spec
def test_levels_times_scales_are_the_numbers(spec: ScaledWeight) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    stored = quantize(weight, spec)
    levels = get_format(spec).levels(
        stored.codes, stored.zero_point, spec.group_shape(*weight.shape)
    )
    assert levels.dtype == (torch.float32 if spec.format == "nf4" else torch.int8)
    product = levels.float() * spread(stored.scale, spec, weight).float()
    assert torch.equal(product, decoded(stored, spec))


def test_every_16_bit_value_has_the_nearest_nf4_level() -> None:
    """All bfloat16 and float16 numbers in [-1, 1], in blocks that hold 1."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
        inside = every[every.float().abs() <= 1].float()
        inside = torch.cat([inside, inside.new_zeros(-len(inside) % 63)]).view(-1, 63)
        weight = torch.cat([torch.ones(len(inside), 1), inside], 1)
        stored = quantize(weight, NF4)
        distance = (weight.double()[..., None] - levels).abs()
        chosen = distance.gather(-1, stored.codes.long()[..., None])[..., 0]
        # Midpoints are rounded to float32, as they are in bitsandbytes.
        assert bool((chosen <= distance.amin(-1) + 2.0**-24).all())


@pytest.mark.parametrize("number", range(7))
def test_golden_bytes(number: int, kit: Any) -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))
    case, shape = golden["cases"][number], golden["shape"]
    weight = torch.from_numpy(
        np.frombuffer(bytes.fromhex(golden["weight"]), "<f4").reshape(shape).copy()
    )
    spec = kit.read_spec(case["spec"])
    assert spec == SPECS[number].model_copy(
        update={"group_size": 32} if spec.format == "int4" else {}
    )
    stored = quantize(weight, spec)
    assert stored.codes.flatten().tolist() == [int(digit, 16) for digit in case["codes"]]
    assert stored.scale is not None
    assert stored.scale.view(torch.uint8).numpy().tobytes().hex() == case["scale"]
    zeros = None if stored.zero_point is None else stored.zero_point.flatten().tolist()
    assert zeros == case["zero_point"]


def test_nf4_has_the_bits_of_bitsandbytes() -> None:
    """What ``bitsandbytes.functional.quantize_4bit`` 0.50 made of these weights, block size 64."""
    golden = json.loads(GOLDEN.read_text("utf-8"))["bitsandbytes"]
    weight = torch.from_numpy(
        np.frombuffer(bytes.fromhex(golden["weight"]), "<f4").reshape(golden["shape"]).copy()
    )
    stored = quantize(weight, NF4)
    packed = stored.codes[:, 0::2].bitwise_left_shift(4) | stored.codes[:, 1::2]
    assert packed.numpy().tobytes().hex() == golden["packed"]
    assert stored.scale is not None
    assert stored.scale.numpy().tobytes().hex() == golden["absmax"]


@given(weight=weights((2, 128)))
@settings(max_examples=15)
def test_nf4_agrees_with_bitsandbytes_itself(weight: Tensor) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    stored = quantize(weight, NF4)
    ours = stored.codes[:, 0::2].bitwise_left_shift(4) | stored.codes[:, 1::2]
    assert torch.equal(ours.reshape(-1, 1), packed)
    assert stored.scale is not None
    assert torch.equal(stored.scale.flatten(), state.absmax)
    assert torch.equal(functional.dequantize_4bit(packed, state), decoded(stored, NF4))
