"""Compiled loops for scales of short runs give the plain steps' bytes, errors and refusals."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats import (
    NonFinite,
    ScaleOutOfRange,
    choose_two_levels,
    effective_scales,
    get_format,
    quantize,
)
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.blockwise import BlockwiseTransform
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.plain_transform import PlainTransform
from quantrecipe.formats.proof import block_proof
from quantrecipe.formats.transform import BlockTransform, block_transform
from quantrecipe.schema.schemes import (
    ClipSearch,
    Float8Block,
    Hadamard,
    Int4Group,
    Int8Tensor,
    LlmInt8,
    MxFp4,
    MxFp8,
    Nf4,
    NvFp4,
    OcpFloor,
    PlainWeight,
    ScaledWeight,
)
from quantrecipe.testing.strategies import weights

pytest.importorskip("numba", reason="the extra `fast` is not installed")

FLOAT32 = PlainWeight(format="float32")
NF4 = Nf4(format="nf4", granularity="block", block_size=64)
INT4 = Int4Group(format="int4", granularity="group", group_size=32)
ZEROS = INT4.model_copy(update={"symmetric": False})
FLOOR = OcpFloor(kind="ocp-floor")
TARGETS: dict[str, Any] = {
    "mxfp8": MxFp8(format="mxfp8", granularity="group"),
    "mxfp8-floor": MxFp8(format="mxfp8", granularity="group", quantizer=FLOOR),
    "mxfp4": MxFp4(format="mxfp4", granularity="group"),
    "mxfp4-floor": MxFp4(format="mxfp4", granularity="group", quantizer=FLOOR),
    "nvfp4": NvFp4(format="nvfp4", granularity="group"),
    "llm_int8": LlmInt8(format="llm_int8", granularity="channel"),
    "nf4": NF4,
    "nf4-double": NF4.model_copy(update={"double_quantized": True}),
    "int4": INT4,
    "int4-zeros": ZEROS,
    "int4-bfloat16": ZEROS.model_copy(update={"scale_dtype": "bfloat16", "group_size": 4}),
}
each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


class Source(NamedTuple):
    """A weight as it is stored."""

    spec: Any
    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None


class Result(NamedTuple):
    """All that a transform writes and says."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    signal: Tensor
    noise: Tensor
    worst: float
    maxima: Tensor


def gaussian(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored_as(spec: Any, weight: Tensor) -> Source:
    stored = quantize(weight, spec)
    return Source(spec, stored.codes, stored.scale, stored.zero_point)


def run(
    transform: BlockTransform, source: Source, target: ScaledWeight, factors: Tensor | None = None
) -> Result:
    """The whole weight, as a converter does it."""
    shape, fmt = source.codes.shape, get_format(target)
    given = SourceBlock(source.codes, source.scales, source.zeros, factors)
    maxima = transform.absmax(given)
    grid = target.scale_grid(*shape)
    codes = torch.full(shape, 99, dtype=torch.uint8).view(fmt.code_dtype)
    scales, by = torch.full(grid, 7.0).to(TORCH_DTYPES[target.grid_dtype]), None
    zeros = torch.full(grid, 7, dtype=torch.uint8) if target.has_zero_points else None
    if target.has_two_levels:
        chosen, by = choose_two_levels(maxima, target)
        scales = effective_scales(chosen, target)
    errors = transform(given, TargetBlock(codes, scales, zeros, by))
    return Result(codes, scales, zeros, *errors, maxima)


def assert_same(
    source: Source,
    target: ScaledWeight,
    factors: Tensor | None = None,
    rotation: Hadamard | None = None,
) -> Result:
    compiled, plain = (
        block_transform(source.spec, target, rotation=rotation, prefer_compiled=fast)  # type: ignore[arg-type]
        for fast in (True, False)
    )
    assert isinstance(compiled, BlockwiseTransform)
    assert isinstance(plain, PlainTransform)
    found, expected = (run(one, source, target, factors) for one in (compiled, plain))
    # The smallest number of a group that has zeros of both signs is either of them.
    assert torch.equal(found.maxima, expected.maxima)
    for one, other in zip(found[:-1], expected[:-1], strict=True):
        if isinstance(one, Tensor):
            assert isinstance(other, Tensor)
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        else:
            assert one == other
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@given(data=st.data())
@settings(max_examples=40)
def test_any_weight(dtype: Any, data: st.DataObject) -> None:
    target = TARGETS[data.draw(st.sampled_from(sorted(TARGETS)))]
    shape = data.draw(st.integers(1, 9)), 64 * data.draw(st.integers(1, 3))
    weight = data.draw(weights(shape, limit=2.0**110, dtype=dtype))
    assert_same(Source(PlainWeight(format=dtype), weight), target)


@each_target
def test_large_weights_are_worked_on_in_parts(target: ScaledWeight) -> None:
    """More rows than are taken at a time, ties, zeros of either sign, numbers of any size."""
    weight = gaussian(300, 1536)
    weight *= torch.exp(4 * gaussian(300, 1, seed=2))
    weight[3], weight[4] = 0, -0.0
    weight[5] = torch.arange(-768, 768) * 0.25
    weight[6] *= 1e-30
    weight[7, :64] = 0
    assert_same(Source(FLOAT32, weight), target)
    assert_same(Source(PlainWeight(format="bfloat16"), weight.bfloat16()), target)


@pytest.mark.parametrize("width", [1, 2, 5, 16, 64, 128, 640])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_any_width(width: int, symmetric: bool) -> None:
    target = INT4.model_copy(update={"group_size": width, "symmetric": symmetric})
    assert_same(Source(FLOAT32, gaussian(7, 640)), target)


@each_target
@pytest.mark.parametrize(
    "source",
    [
        PlainWeight(format="float64"),
        Int8Tensor(format="int8", granularity="tensor"),
        Float8Block(format="float8_e4m3fn", granularity="block", block_size=(128, 128)),
        ZEROS,
        TARGETS["mxfp4"],
        TARGETS["nf4-double"],
    ],
    ids=lambda spec: spec.format,
)
def test_any_source(source: Any, target: ScaledWeight) -> None:
    """Parts are cut where no scaling group of the source is."""
    weight = gaussian(300, 1024)
    assert_same(
        Source(source, weight.double())
        if isinstance(source, PlainWeight)
        else stored_as(source, weight),
        target,
    )


@each_target
def test_smoothed_and_rotated(target: ScaledWeight) -> None:
    factors = torch.exp(gaussian(256, seed=3))
    rotation = Hadamard(kind="hadamard", size=64)
    assert_same(Source(FLOAT32, gaussian(40, 256)), target, factors, rotation)


@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf, -math.inf])
@each_target
def test_numbers_that_are_none_are_refused_by_place(target: ScaledWeight, poison: float) -> None:
    weight = gaussian(600, 1024)
    weight[500, 17] = poison
    transform = block_transform(FLOAT32, target)  # type: ignore[arg-type]
    with pytest.raises(NonFinite) as refused:
        run(transform, Source(FLOAT32, weight), target)
    assert refused.value.index == (500, 17)


def test_codes_of_a_source_that_are_none_are_refused_by_place() -> None:
    source = stored_as(ZEROS, gaussian(600, 1024))
    source.codes[511, 3] = 16
    with pytest.raises(NonFinite, match="code 0x10") as refused:
        run(block_transform(ZEROS, TARGETS["mxfp8"]), source, TARGETS["mxfp8"])
    assert refused.value.index == (511, 3)


def test_scales_beyond_their_dtype_are_refused_by_place() -> None:
    target = INT4.model_copy(update={"scale_dtype": "float16"})
    weight = gaussian(600, 1024)
    weight[513, 40] = 1e7
    with pytest.raises(ScaleOutOfRange) as refused:
        run(block_transform(FLOAT32, target), Source(FLOAT32, weight), target)
    assert refused.value.index == (513, 1)


def test_codes_beyond_float32_are_refused_by_place() -> None:
    """The nearest e4m3 to the largest float32 is a power of two that float32 has not."""
    target = TARGETS["mxfp8"]
    weight = gaussian(5, 64)
    weight[3, 40] = torch.finfo(torch.float32).max
    with pytest.raises(NonFinite) as refused:
        run(block_transform(FLOAT32, target), Source(FLOAT32, weight), target)
    assert refused.value.index == (3, 40)


@pytest.mark.parametrize("name", ["nvfp4", "nf4-double"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_scales_that_are_given_are_looked_at(name: str, wrong: float) -> None:
    target, weight = TARGETS[name], gaussian(4, 64)
    scales = torch.ones(target.scale_grid(4, 64))
    scales[2, 0] = wrong
    codes = torch.empty(4, 64, dtype=torch.uint8)
    for fast in (True, False):
        transform = block_transform(FLOAT32, target, prefer_compiled=fast)
        with pytest.raises(ValueError, match="positive and finite"):
            transform(SourceBlock(weight), TargetBlock(codes, scales))


def test_memory_that_is_not_as_it_should_be_is_left_to_the_plain_path() -> None:
    target = TARGETS["mxfp4"]
    transform = block_transform(FLOAT32, target)
    weight, codes = gaussian(4, 64), torch.zeros(4, 64, dtype=torch.uint8)
    scales = torch.zeros(4, 2).to(torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match="out must be"):
        transform(SourceBlock(weight), TargetBlock(codes[:, :32], scales))
    with pytest.raises(ValueError, match=r"scales are given as|has scales"):
        transform(SourceBlock(weight), TargetBlock(codes, torch.zeros(4, 2)))


def test_columns_are_measured_as_in_the_plain_path() -> None:
    weight = gaussian(9, 64)
    found = torch.zeros(64)
    block_transform(FLOAT32, TARGETS["nvfp4"]).column_absmax(SourceBlock(weight), found)
    assert torch.equal(found, weight.abs().amax(0))


@each_target
def test_what_was_written_is_proven_and_a_flipped_bit_is_not(target: ScaledWeight) -> None:
    weight = gaussian(40, 128)
    stored = quantize(weight, target)
    proof = block_proof(FLOAT32, target)  # type: ignore[arg-type]
    assert stored.scale is not None
    given = SourceBlock(weight), TargetBlock(stored.codes, stored.scale, stored.zero_point)
    found = proof(*given)
    assert found.broken == 0
    assert 0.9 < found.of_bound <= 1
    stored.codes.view(torch.uint8)[10, 3] ^= 4
    found = proof(*given)
    assert found.broken == 1
    assert found.first is not None
    assert (found.first.row, found.first.column) == (10, 3)


@pytest.mark.parametrize("name", ["mxfp8", "nf4", "nvfp4"])
def test_threads_share_a_transform(name: str) -> None:
    target = TARGETS[name]
    cases = [Source(FLOAT32, gaussian(400, 1024, seed=seed)) for seed in range(4)]
    transform = block_transform(FLOAT32, target)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda case: run(transform, case, target), cases))
    for case, result in zip(cases, found, strict=True):
        assert torch.equal(
            result.codes.view(torch.uint8), quantize(case.codes, target).codes.view(torch.uint8)
        )


def test_scales_that_are_searched_are_searched_in_torch() -> None:
    searching = NF4.model_copy(update={"quantizer": ClipSearch(kind="clip-search")})
    assert isinstance(block_transform(FLOAT32, searching), PlainTransform)
