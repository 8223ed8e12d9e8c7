"""The compiled proof finds what the plain one finds, to the last bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats import (
    NonFinite,
    Unrepresentable,
    dequantize,
    get_format,
    quantize,
    row_errors,
)
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.proof import (
    SLACK,
    BlockProof,
    CompiledProof,
    PlainProof,
    Proven,
    TargetNonFinite,
    block_proof,
)
from quantrecipe.schema.schemes import PlainWeight
from tests.formats.test_formats_transform import Case, smoothing, sources, stored, takes_shape

FLOAT32 = PlainWeight(format="float32")


def both(case: Case) -> tuple[BlockProof, BlockProof]:
    plain = block_proof(case.source, case.target, prefer_compiled=False)
    compiled = block_proof(case.source, case.target)
    assert isinstance(plain, PlainProof)
    assert isinstance(compiled, CompiledProof)
    return plain, compiled


def prove(proof: BlockProof, case: Case, codes: Tensor, scales: Tensor) -> Proven | str:
    """What is found, or what is refused, as one comparable thing."""
    try:
        source = SourceBlock(case.codes, case.scales, factors=case.factors)
        return proof(source, TargetBlock(codes, scales))
    except Unrepresentable as refused:
        return f"{type(refused).__name__} {refused} {refused.index}"


def assert_same(found: Proven | str, expected: Proven | str) -> None:
    if isinstance(found, str) or isinstance(expected, str):
        assert found == expected
        return
    assert torch.equal(found.amax, expected.amax)
    assert torch.equal(found.errors.signal, expected.errors.signal)
    assert torch.equal(found.errors.noise, expected.errors.noise)
    assert repr(found.errors.worst_in_scales) == repr(expected.errors.worst_in_scales)
    assert repr(found[2:]) == repr(expected[2:])


@given(data=st.data(), flips=st.integers(0, 3))
@settings(max_examples=300)
def test_both_find_the_same(data: st.DataObject, flips: int, kit: Any) -> None:
    weight, target = data.draw(kit.cases())
    source = data.draw(st.sampled_from([s for s in sources(kit) if takes_shape(s, weight)]))
    seed = data.draw(st.none() | st.integers(0, 99))
    factors = None if seed is None else smoothing(seed, weight.shape[1])
    case = Case(source, target, *stored(weight, source), factors)
    values = dequantize(case.codes, case.scales, source)
    values = values if factors is None else values * factors
    try:
        made = quantize(values, target)
    except Unrepresentable:
        return
    assert made.scale is not None
    code_bytes = made.codes.view(torch.uint8).flatten()
    for _ in range(flips):
        code_bytes[data.draw(st.integers(0, len(code_bytes) - 1))] ^= data.draw(st.integers(1, 255))
    plain, compiled = (prove(proof, case, made.codes, made.scale) for proof in both(case))
    assert_same(compiled, plain)
    if isinstance(plain, str):
        return
    # And that is what the steps say one by one.
    fmt = get_format(target)
    assert torch.equal(plain.amax, fmt.measure(values, target))
    errors = row_errors(values, made.codes, made.scale, target)
    assert torch.equal(plain.errors.noise, errors.noise)
    assert plain.errors.worst_in_scales == errors.worst_in_scales
    off = (dequantize(made.codes, made.scale, target).double() - values).abs()
    bound = fmt.bound(values, made.codes, made.scale, target) * SLACK
    assert plain.of_bound == float((off / bound).max())
    assert plain.broken == int((off > bound).sum())
    assert (plain.first is None) == (plain.broken == 0)
    if not flips:
        assert plain.broken == 0


@pytest.mark.parametrize("columns", [1, 1023, 1024, 1025, 4096, 4097, 9000])
@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_wide_rows_and_where_they_break(fmt: str, columns: int, kit: Any) -> None:
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
    for granularity in ("tensor", "channel"):
        case = Case(FLOAT32, kit.spec(fmt, granularity), weight, None, None)
        made = quantize(weight, case.target)
        assert made.scale is not None
        plain, compiled = (prove(proof, case, made.codes, made.scale) for proof in both(case))
        assert_same(compiled, plain)
        assert isinstance(plain, Proven)
        assert 0 <= plain.of_bound <= 1
        made.codes.view(torch.uint8)[1:, -1] ^= 0x80
        plain, compiled = (prove(proof, case, made.codes, made.scale) for proof in both(case))
        assert_same(compiled, plain)
        assert isinstance(plain, Proven)
        assert plain.first is not None
        assert plain.of_bound > 1
        assert (plain.broken, *plain.first[:2]) == (2, 1, columns - 1)
        assert plain.first.error > plain.first.bound > 0


def test_a_number_that_is_none_is_told_apart_by_whose_it_is(kit: Any) -> None:
    for fmt in ("float8_e4m3fn", "float8_e5m2"):
        weight = torch.ones(4, 6)
        made = quantize(weight, kit.spec(fmt))
        assert made.scale is not None
        poisoned = weight.clone()
        poisoned[2, 3] = math.inf
        for proof in both(Case(FLOAT32, kit.spec(fmt), weight, None, None)):
            with pytest.raises(NonFinite) as refused:
                proof(SourceBlock(poisoned), TargetBlock(made.codes, made.scale))
            assert (type(refused.value), refused.value.index) == (NonFinite, (2, 3))
            codes = made.codes.clone()
            codes.view(torch.uint8)[1, 4] = 0xFF
            with pytest.raises(TargetNonFinite) as refused:
                proof(SourceBlock(weight), TargetBlock(codes, made.scale))
            assert refused.value.index == (1, 4)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-45, 2.0**-126, 2.0**121, 3e38, math.inf, math.nan])
@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn"])
def test_scales_that_no_converter_writes(fmt: str, scale: float, kit: Any) -> None:
    weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(4))
    weight[:, 0] = 0
    case = Case(FLOAT32, kit.spec(fmt), weight, None, None)
    made = quantize(weight, case.target)
    assert made.scale is not None
    scales = made.scale.clone()
    scales[1] = scale
    plain, compiled = (prove(proof, case, made.codes, scales) for proof in both(case))
    assert_same(compiled, plain)
    # A small scale is within what its bound allows for clipping: maxima tell of it.
    assert isinstance(plain, str) or not math.isnan(plain.of_bound)


def test_what_is_not_covered_is_plain(kit: Any) -> None:
    wide = block_proof(PlainWeight(format="float64"), kit.spec("int8"))
    assert isinstance(wide, PlainProof)
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(6))
    case = Case(FLOAT32, kit.spec("int8"), weight, None, None)
    made = quantize(weight, case.target)
    assert made.scale is not None
    strided = made.codes.t().contiguous().t()
    plain, compiled = both(case)
    expected = prove(plain, case, made.codes, made.scale)
    assert_same(prove(compiled, case, strided, made.scale), expected)
    with pytest.raises(ValueError, match="has scales"):
        compiled(SourceBlock(weight), TargetBlock(made.codes, torch.ones(5, 1)))
