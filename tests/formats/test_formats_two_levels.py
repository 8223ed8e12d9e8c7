"""Scales under a second level of scales: nvfp4's, and those of nf4 as 8-bit codes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats import (
    NonFinite,
    ScaleOutOfRange,
    TwoLevelScales,
    choose_two_levels,
    dequantize,
    effective_scales,
    get_format,
    quantize,
    row_errors,
)
from quantrecipe.formats.double_quantization import compress, decompress, dynamic_map
from quantrecipe.schema.schemes import Nf4, NvFp4, ScaledWeight
from quantrecipe.testing.strategies import weights

SLACK = 1 + 1e-6
NF4 = Nf4(format="nf4", granularity="block", block_size=64)
DOUBLE = NF4.model_copy(update={"double_quantized": True})
NVFP4 = NvFp4(format="nvfp4", granularity="group")
TWO_LEVELS = (DOUBLE, NVFP4)
each_spec = pytest.mark.parametrize("spec", TWO_LEVELS, ids=lambda spec: spec.format)

# Half of the widest step between 8-bit levels, and half of a step of the 65,535 that find them.
NEAREST = 0.0140625 / 2 + 1 / 65535
MAP = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


def gaussian(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_the_map_is_dynamic_tree_quantization() -> None:
    """Its bytes, and what they come from: means of equal intervals of 7 decades, of either sign."""
    found = dynamic_map()
    assert hashlib.sha256(found.numpy().astype("<f4").tobytes()).hexdigest() == MAP
    expected = [0.0, 1.0]
    for decade in range(7):
        step = 0.9 / 2**decade
        middles = [0.1 + step * (place + 0.5) for place in range(2**decade)]
        expected += [sign * middle * 10.0 ** (decade - 6) for middle in middles for sign in (1, -1)]
    assert found.tolist() == pytest.approx(sorted(expected), rel=1e-6)
    assert float(found.diff().min()) > 0


@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 90)), data=st.data())
@settings(max_examples=60)
def test_compressed_scales_are_near(shape: tuple[int, int], data: st.DataObject) -> None:
    scales = data.draw(weights(shape, limit=2.0**60)).abs()
    codes, maxima, mean = compress(scales)
    off = (decompress(codes, maxima, mean).double() - scales.double()).abs().flatten()
    largest = maxima.double().repeat_interleave(256)[: off.numel()]
    # Taking the mean off and adding it again rounds by as much as the numbers are large.
    rounding = 2.0**-22 * (scales.double().flatten() + mean.double().abs())
    assert bool((off <= NEAREST * largest * SLACK + rounding + 2.0**-120).all())
    assert codes.shape == shape
    assert maxima.shape == (-(-scales.numel() // 256),)


def test_the_nearest_level_bound_is_reached() -> None:
    scales = torch.linspace(0, 2, 1 << 14).view(64, -1)
    codes, maxima, mean = compress(scales)
    off = (decompress(codes, maxima, mean) - scales).abs()
    assert 0.99 * NEAREST < float((off / maxima.view(64, -1)).max()) < NEAREST


@pytest.mark.parametrize("count", [*range(1, 75), 255, 256, 257, 1000, 4096, 32767, 70000, 300001])
def test_the_mean_is_torchs_with_one_thread(count: int, threads: int) -> None:
    """And the same with more, which torch itself does not promise."""
    scales = torch.rand(count, generator=torch.Generator().manual_seed(count)) * 3
    mean = compress(scales[None])[2]
    torch.set_num_threads(1)
    assert mean[0] == scales.mean()


@given(data=st.data())
@settings(max_examples=60)
def test_no_error_of_nf4_exceeds_its_bound(data: st.DataObject, kit: Any) -> None:
    shape = data.draw(st.integers(1, 12)), 64 * data.draw(st.integers(1, 3))
    weight = data.draw(weights(shape, limit=2.0**60))
    stored = quantize(weight, DOUBLE)
    assert stored.scale is not None
    assert stored.two_levels is not None
    error = (weight - dequantize(stored.codes, stored.scale, DOUBLE)).abs().double()
    bound = get_format(DOUBLE).bound(weight, stored.codes, stored.scale, DOUBLE)
    assert bool((error <= bound * SLACK).all())
    # The published constants: those of nf4, and the 8-bit code's share of the largest of its 256.
    amax = weight.double().abs().view(shape[0], -1, 64).amax(2)
    count = amax.numel()
    added = NEAREST * stored.two_levels.second.double().repeat_interleave(256)[:count]
    most = torch.where(weight < 0, 0.1519036, 0.1385216).double().view(shape[0], -1, 64)
    limit = most * amax[..., None] + added.view(amax.shape)[..., None]
    rounding = 2.0**-20 * (amax.amax() + 2.0**-100)
    assert bool((error.view(limit.shape) <= limit * SLACK + rounding).all())


def test_codes_of_nf4_are_those_of_the_maxima() -> None:
    weight = gaussian(40, 192)
    plain, double = quantize(weight, NF4), quantize(weight, DOUBLE)
    assert torch.equal(plain.codes, double.codes)
    assert double.scale is not None
    assert plain.scale is not None
    assert not torch.equal(plain.scale, double.scale)
    assert torch.allclose(plain.scale, double.scale, rtol=0.05)


def test_a_scale_may_come_back_negative() -> None:
    """Small ones beside a huge one; what they multiply keeps its bound."""
    weight = gaussian(8, 64) * 1e-3
    weight[3, 5] = 1000
    stored = quantize(weight, DOUBLE)
    assert stored.scale is not None
    assert float(stored.scale.min()) < 0
    error = (weight - dequantize(stored.codes, stored.scale, DOUBLE)).abs().double()
    assert bool((error <= get_format(DOUBLE).bound(weight, *_pair(stored), DOUBLE)).all())
    worst = row_errors(weight, *_pair(stored), DOUBLE).worst_in_scales
    assert math.isfinite(worst)
    assert worst > 0


def _pair(stored: Any) -> tuple[Tensor, Tensor]:
    return stored.codes, stored.scale


@pytest.mark.parametrize("number", [0.0, 0.5, 2.0**-126, 2.0**-140])
def test_equal_scales_are_their_mean(number: float) -> None:
    """Nothing is left of them: maxima 0 and codes 0."""
    codes, maxima, mean = compress(torch.full((4, 128), number))
    assert mean.tolist() == [pytest.approx(number, rel=1e-7, abs=0)]
    assert maxima.tolist() == [0.0, 0.0]
    assert int(codes.count_nonzero()) == 0
    assert bool((decompress(codes, maxima, mean) == mean).all())


@pytest.mark.parametrize("scale", [2.0**-130, 2.0**-149])
def test_differences_whose_reciprocal_is_none(scale: float) -> None:
    scales = torch.zeros(1, 256)
    scales[0, ::2] = scale
    codes, maxima, mean = compress(scales)
    off = (decompress(codes, maxima, mean) - scales).abs()
    assert bool((off <= 2.5 * maxima + 2.0**-149).all())


@each_spec
def test_a_whole_weight_or_its_maxima(spec: ScaledWeight) -> None:
    weight = gaussian(30, 256)
    stored = quantize(weight, spec)
    fmt = get_format(spec)
    chosen, grid = choose_two_levels(fmt.measure(weight, spec), spec)
    assert stored.two_levels is not None
    assert torch.equal(chosen.second, stored.two_levels.second)
    assert torch.equal(chosen.scale.view(torch.uint8), stored.two_levels.scale.view(torch.uint8))
    assert torch.equal(fmt.encode(weight, grid, spec), stored.codes)
    assert torch.equal(fmt.scales(fmt.measure(weight, spec), spec), grid)
    assert stored.scale is not None
    assert torch.equal(effective_scales(chosen, spec), stored.scale)
    assert chosen.scale.shape == stored.scale.shape == grid.shape


@pytest.mark.parametrize("spec", TWO_LEVELS, ids=lambda spec: spec.format)
def test_a_number_that_is_none_in_the_second_level_is_refused(spec: ScaledWeight) -> None:
    stored = quantize(gaussian(3, 64), spec)
    assert stored.two_levels is not None
    stored.two_levels.second[0] = math.inf
    with pytest.raises(NonFinite):
        dequantize(stored.codes, effective_scales(stored.two_levels, spec), spec)


def test_scales_without_a_mean_are_refused() -> None:
    weight = torch.full((4, 64), 2.0**126)
    weight[2, 7] = 1.5 * 2.0**126
    with pytest.raises(ScaleOutOfRange, match="the sum of scales") as refused:
        quantize(weight, DOUBLE)
    assert refused.value.index == (2, 0)


def test_parts_that_do_not_fit_are_refused() -> None:
    stored = quantize(gaussian(4, 128), DOUBLE).two_levels
    assert stored is not None
    with pytest.raises(ValueError, match="need the mean"):
        effective_scales(TwoLevelScales(stored.scale, stored.second, None), DOUBLE)
    with pytest.raises(ValueError, match="1 maxima and one mean"):
        effective_scales(
            TwoLevelScales(stored.scale, stored.second.repeat(2), stored.offset), DOUBLE
        )
    blocks = quantize(gaussian(4, 128), NVFP4).two_levels
    assert blocks is not None
    with pytest.raises(ValueError, match="one number multiplies"):
        effective_scales(TwoLevelScales(blocks.scale, blocks.second.repeat(2), None), NVFP4)
    with pytest.raises(ValueError, match="have one level"):
        choose_two_levels(torch.ones(1, 1), NF4)


@given(exponent=st.integers(-20, 20))
@settings(max_examples=20)
def test_powers_of_two_move_to_the_second_level(exponent: int) -> None:
    weight = gaussian(20, 192, seed=9)
    for spec in TWO_LEVELS:
        stored, scaled = quantize(weight, spec), quantize(weight * 2.0**exponent, spec)
        assert torch.equal(stored.codes, scaled.codes)
        assert stored.two_levels is not None
        assert scaled.two_levels is not None
        first, second = (levels.scale.view(torch.uint8) for levels in _both(stored, scaled))
        assert torch.equal(first, second)
        assert torch.equal(scaled.two_levels.second, stored.two_levels.second * 2.0**exponent)


def _both(*found: Any) -> tuple[TwoLevelScales, ...]:
    return tuple(one.two_levels for one in found)
