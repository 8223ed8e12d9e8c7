"""Rotation: orthonormal, its own inverse, the same bits however it is cut, and worth it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats import NonFinite, dequantize, quantize
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.proof import block_proof
from quantrecipe.formats.rotation import hadamard, rotate_
from quantrecipe.formats.transform import block_transform
from quantrecipe.schema.schemes import (
    AnyScaledWeight,
    ClipSearch,
    Float8Block,
    Float8Channel,
    Hadamard,
    Int4Group,
    Int8Channel,
    Int8Group,
    Int8Tensor,
    PlainWeight,
)
from quantrecipe.testing.strategies import activations, weights

SIZES = [4, 16, 64, 256, 1024]
CPU = torch.device("cpu")
FLOAT32 = PlainWeight(format="float32")
CHANNEL = Int8Channel(format="int8", granularity="channel")
TARGETS: list[AnyScaledWeight] = [
    CHANNEL,
    CHANNEL.model_copy(update={"quantizer": ClipSearch(kind="clip-search", steps=4)}),
    Int8Tensor(format="int8", granularity="tensor"),
    Int8Group(format="int8", granularity="group", group_size=8),
    Float8Channel(format="float8_e4m3fn", granularity="channel"),
    Float8Block(format="float8_e5m2", granularity="block", block_size=(3, 5)),
    Int4Group(format="int4", granularity="group", group_size=8),
]

# What comfy-kitchen 0.2.40 builds for its "convrot" checkpoints, times 4, by rows:
# comfy_kitchen.tensor.int8_utils._build_hadamard(16).
GOLDEN = """
    +++-+++-+++----+ ++-+++-+++-+--+- +-+++-+++-++-+-- -+++-+++-++++---
    +++-+++----++++- ++-+++-+--+-++-+ +-+++-++-+--+-++ -+++-++++----+++
    +++----++++-+++- ++-+--+-++-+++-+ +-++-+--+-+++-++ -++++----+++-+++
    ---++++-+++-+++- --+-++-+++-+++-+ -+--+-+++-+++-++ +----+++-+++-+++
"""


def oracle(size: int) -> Tensor:
    """``H`` in float64, by its definition."""
    root = torch.tensor(
        [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64
    )
    found = root
    while len(found) < size:
        found = torch.kron(found, root)
    return found / math.sqrt(size)


def blocks(values: Tensor, size: int) -> Tensor:
    return values.reshape(*values.shape[:-1], -1, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_matrix_is_that_of_the_definition(size: int, dtype: torch.dtype) -> None:
    found = hadamard(size, CPU, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.double(), oracle(size))


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_regular_symmetric_and_its_own_inverse(size: int) -> None:
    found = hadamard(size, CPU, torch.float64)
    assert torch.equal(found, found.T)
    assert torch.equal(found @ found, torch.eye(size, dtype=torch.float64))
    assert torch.equal(found.sum(0), torch.ones(size, dtype=torch.float64))


def test_the_matrix_is_that_of_convrot() -> None:
    rows = [[1.0 if sign == "+" else -1.0 for sign in row] for row in GOLDEN.split()]
    assert torch.equal(hadamard(16, CPU, torch.float32) * 4, torch.tensor(rows))


@st.composite
def rotatable(draw: st.DrawFn, sizes: list[int] = SIZES[:3]) -> tuple[Tensor, int]:
    size = draw(st.sampled_from(sizes))
    shape = draw(st.integers(1, 5)), size * draw(st.integers(1, 3))
    return draw(weights(shape, limit=2.0**100)), size


@given(rotatable())
def test_the_error_is_within_the_bound(case: tuple[Tensor, int]) -> None:
    values, size = case
    steps = round(math.log(size, 4))
    exact = blocks(values.double(), size) @ oracle(size)
    found = blocks(rotate_(values.clone(), size), size)
    sums = blocks(values.double(), size).abs().sum(-1, keepdim=True) / 2.0**steps
    # Sums of exact products in float64 are themselves not exact.
    bound = ((1 + 2.0**-24) ** (2 * steps) - 1 + size * 2.0**-52) * sums + 2.0**-150
    assert ((found.double() - exact).abs() <= bound).all()


@given(rotatable())
def test_twice_is_the_identity_but_for_rounding(case: tuple[Tensor, int]) -> None:
    values, size = case
    steps = round(math.log(size, 4))
    again = rotate_(rotate_(values.clone(), size), size)
    largest = blocks(values.double(), size).norm(dim=-1, keepdim=True)
    # Each rotation errs by 2 k u |x|_1 / 2^k at most, and |x|_1 / 2^k is no more than |x|_2; the
    # second rotation carries the first one's errors on with the norm that they have.
    bound = largest * (2 * steps * 2.0**-24) * (1 + 2.0**steps) * 1.001 + size * 2.0**-149
    assert ((blocks(again.double() - values.double(), size)).abs() <= bound).all()


@given(rotatable(), st.data())
def test_rows_and_blocks_do_not_see_each_other(
    case: tuple[Tensor, int], data: st.DataObject
) -> None:
    values, size = case
    row = data.draw(st.integers(0, len(values) - 1))
    block = data.draw(st.integers(0, values.shape[1] // size - 1)) * size
    whole = rotate_(values.clone(), size)
    alone = rotate_(values[row : row + 1, block : block + size].clone(), size)
    assert torch.equal(whole[row : row + 1, block : block + size], alone)


def test_large_tensors_are_cut_for_the_cache_and_no_bit_differs() -> None:
    values = torch.randn(3, 1 << 16, generator=torch.Generator().manual_seed(0))
    whole = rotate_(values.clone(), 1024)
    rows = torch.cat([rotate_(each.clone(), 1024) for each in torch.split(values, 5 * 1024, 1)], 1)
    assert torch.equal(whole, rows)


@pytest.mark.parametrize(("columns", "size"), [(6, 4), (8, 8), (4, 16), (8, 2), (4, 1), (64, 32)])
def test_other_sizes_are_refused(columns: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"in blocks of {size}"):
        rotate_(torch.zeros(2, columns), size)


@given(st.data(), st.sampled_from([4, 16]))
def test_the_product_is_what_it_was(data: st.DataObject, size: int) -> None:
    features = size * data.draw(st.integers(1, 3))
    x = data.draw(activations(features, dtype="float64"))
    w = data.draw(activations(features, dtype="float64"))
    s = torch.linspace(0.5, 2.0, features, dtype=torch.float64)
    found = rotate_(x / s, size) @ rotate_(w * s, size).T
    scale = x.norm(dim=1)[:, None] * w.norm(dim=1) * 4
    assert ((found - x @ w.T).abs() <= scale * 1e-13).all()


@pytest.mark.parametrize(
    "target",
    TARGETS,
    ids=lambda target: f"{target.format}-{target.granularity}-{target.quantizer.kind}",
)
@pytest.mark.parametrize("compiled", [False, True])
@settings(max_examples=20)
@given(case=rotatable([16]), size=st.integers(1, 4), factor=st.booleans())
def test_a_transform_quantizes_the_rotated_weight(
    case: tuple[Tensor, int], size: int, factor: bool, compiled: bool, target: AnyScaledWeight
) -> None:
    weight, columns = case
    if compiled:
        pytest.importorskip("numba")
    weight = (weight * 2.0**-60).clamp(-(2.0**30), 2.0**30)
    factors = torch.linspace(0.3, 3.0, weight.shape[1]) if factor else None
    smoothed = weight if factors is None else weight * factors
    expected = quantize(rotate_(smoothed.clone(), columns), target)
    assert expected.scale is not None
    transform = block_transform(
        FLOAT32,
        target,
        rotation=Hadamard(kind="hadamard", size=16),
        prefer_compiled=compiled,
    )
    rows, height = len(weight), target.group_shape(*weight.shape)[0]
    size = 3 * size if height == 3 else size
    codes, scales = torch.empty_like(expected.codes), torch.empty_like(expected.scale)
    if target.granularity == "tensor":
        scales.copy_(expected.scale)
        cuts = [weight[top : top + size].contiguous() for top in range(0, rows, size)]
        found = torch.stack(
            [transform.absmax(SourceBlock(cut, factors=factors)) for cut in cuts]
        ).amax()
        assert found == rotate_(smoothed.clone(), columns).abs().amax()
    for top in range(0, rows, size):
        cut = slice(top, min(rows, top + size))
        grid = scales[top // height : -(-cut.stop // height)]
        source = SourceBlock(weight[cut].contiguous(), factors=factors)
        transform(source, TargetBlock(codes[cut], grid))
    assert torch.equal(codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(scales, expected.scale)


@given(case=rotatable([4, 16, 64]), target=st.sampled_from(TARGETS))
@settings(max_examples=40)
def test_a_proof_holds_codes_to_the_rotated_weight(
    case: tuple[Tensor, int], target: AnyScaledWeight
) -> None:
    pytest.importorskip("numba")
    weight, size = case
    assume(target.refuses(*weight.shape) is None)
    weight = (weight * 2.0**-60).clamp(-(2.0**30), 2.0**30)
    stored = quantize(rotate_(weight.clone(), size), target)
    assert stored.scale is not None
    rotation = Hadamard.model_validate({"kind": "hadamard", "size": size})
    for compiled in (False, True):
        prove = block_proof(FLOAT32, target, rotation=rotation, prefer_compiled=compiled)
        made = TargetBlock(stored.codes, stored.scale)
        found = prove(SourceBlock(weight), made)
        assert found.broken == 0
        assert found.of_bound <= 1
        plain = block_proof(FLOAT32, target, prefer_compiled=compiled)
        other = plain(SourceBlock(rotate_(weight.clone(), size)), made)
        assert torch.equal(other.amax, found.amax)
        assert other.of_bound == found.of_bound


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_no_number_is_refused_in_its_own_place(compiled: bool, poison: float) -> None:
    weight = torch.ones(3, 32)
    weight[1, 21] = poison
    transform = block_transform(
        FLOAT32, CHANNEL, rotation=Hadamard(kind="hadamard", size=16), prefer_compiled=compiled
    )
    with pytest.raises(NonFinite) as refused:
        transform(
            SourceBlock(weight),
            TargetBlock(torch.empty(3, 32, dtype=torch.int8), torch.empty(3, 1)),
        )
    assert refused.value.index == (1, 21)


def sqnr(x: Tensor, w: Tensor, *, alpha: float | None, size: int | None) -> float:
    """Decibels of a W8A8 linear whose inputs are smoothed, rotated, or both."""
    s = torch.ones(x.shape[1])
    if alpha is not None:
        s = x.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)
    inputs, weight = x / s, w * s
    if size is not None:
        inputs, weight = rotate_(inputs, size), rotate_(weight, size)
    kept = [quantize(each, CHANNEL) for each in (inputs, weight)]
    a, b = (dequantize(each.codes, each.scale, CHANNEL).double() for each in kept)
    exact = x.double() @ w.double().T
    return float(10 * torch.log10(exact.square().sum() / (a @ b.T - exact).square().sum()))


@pytest.mark.parametrize("seed", range(3))
def test_rotation_beats_smoothing_on_spikes_and_both_beat_either(seed: int) -> None:
    # Channels that are large in every token are what smoothing is for; spikes of single tokens,
    # each in another place, it cannot see by channel.
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 512, generator=random)
    x *= torch.exp(torch.randn(512, generator=random))
    x[torch.rand(256, 512, generator=random) < 0.002] *= 60
    w = torch.randn(64, 512, generator=random) * 0.03
    plain = sqnr(x, w, alpha=None, size=None)
    smoothed = sqnr(x, w, alpha=0.5, size=None)
    rotated = sqnr(x, w, alpha=None, size=256)
    both = sqnr(x, w, alpha=0.5, size=256)
    assert smoothed > plain
    assert rotated > smoothed + 3
    assert both > rotated + 1
