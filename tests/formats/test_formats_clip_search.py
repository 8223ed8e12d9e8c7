"""The quantizer clip-search: what it promises of errors, and that it finds the same everywhere."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats import ScaleOutOfRange, dequantize, get_format, quantize
from quantrecipe.formats.clip_search import accuracy, candidates, choose_scales
from quantrecipe.schema.schemes import (
    Absmax,
    ClipSearch,
    Int8Channel,
    ScaledWeight,
)
from quantrecipe.testing import strategies

SPECS = strategies.weight_specs(
    formats=("int8", "float8_e4m3fn", "float8_e5m2"), quantizers=("clip-search",)
).filter(lambda spec: getattr(spec, "granularity", None) != "tensor")


def searching(spec: ScaledWeight, **fields: Any) -> ScaledWeight:
    return spec.model_copy(update={"quantizer": ClipSearch(kind="clip-search", **fields)})


def importances(columns: int) -> st.SearchStrategy[Tensor | None]:
    """Nothing, or numbers of very different sizes with zeros among them."""

    def drawn(seed: int) -> Tensor:
        random = np.random.default_rng(seed)
        values = np.exp2(random.uniform(-30, 30, columns)) * (random.random(columns) < 0.8)
        return torch.from_numpy(values.astype(np.float32))

    return st.none() | st.builds(drawn, st.integers(0, 999))


@st.composite
def searched(draw: st.DrawFn, *, moderate: bool = False) -> tuple[Tensor, Any, Tensor | None]:
    weight, spec = draw(strategies.quantizable(SPECS, moderate=moderate))
    return weight, spec, draw(importances(weight.shape[1]))


def bits(tensor: Tensor | None) -> bytes:
    assert tensor is not None
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def weighted_error(off: Tensor, importance: Tensor | None) -> Fraction:
    """The exact ``sum importance off^2`` of a group ``[rows, columns]``."""
    counts = [1.0] * off.shape[1] if importance is None else importance.tolist()
    return sum(
        (
            Fraction(c) * Fraction(o) ** 2
            for row in off.tolist()
            for o, c in zip(row, counts, strict=True)
        ),
        start=Fraction(0),
    )


def each_group(weight: Tensor, spec: Any) -> list[tuple[tuple[int, int], tuple[slice, slice]]]:
    height, width = spec.group_shape(*weight.shape)
    rows, columns = spec.scale_grid(*weight.shape)
    return [
        ((i, j), (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)))
        for i in range(rows)
        for j in range(columns)
    ]


@given(case=searched())
@settings(max_examples=25)
def test_no_candidate_has_less_error(case: tuple[Tensor, Any, Tensor | None]) -> None:
    """That of absmax among them; but for the rounding of each term, which is half a unit."""
    weight, spec, importance = case
    fmt = get_format(spec)
    chosen, _ = choose_scales(weight, fmt, spec, importance)
    tried = [scales for scales, _ in candidates(fmt.measure(weight, spec), fmt, spec)]
    assert bits(tried[0]) == bits(quantize(weight, absmax_of(spec)).scale)
    off = [fmt.decode(fmt.encode(weight, s, spec), s, spec) - weight for s in [*tried, chosen]]
    for index, cut in each_group(weight, spec):
        counts = None if importance is None else importance[cut[1]]
        errors = [weighted_error(one[cut], counts) for one in off]
        assert errors[-1] in errors[:-1]
        slack = unit_of(weight[cut], counts, spec) * weight[cut].numel()
        assert errors[-1] <= min(errors) + slack, index


def absmax_of(spec: ScaledWeight) -> ScaledWeight:
    return spec.model_copy(update={"quantizer": Absmax(kind="absmax")})


def unit_of(group: Tensor, importance: Tensor | None, spec: Any) -> Fraction:
    """What one counts as, in a sum of terms."""
    largest = 1.0 if importance is None else float(importance.max())
    power = 2 * math.frexp(float(group.abs().max()))[1]
    # Without importance a column counts 1, and not less.
    power += 0 if importance is None else math.frexp(largest)[1]
    return Fraction(2) ** (power - accuracy(spec.group_shape(*group.shape)))


@given(case=searched())
@settings(max_examples=20)
def test_the_bound_of_the_format_holds(case: tuple[Tensor, Any, Tensor | None]) -> None:
    weight, spec, importance = case
    stored = quantize(weight, spec, importance)
    assert stored.scale is not None
    bound = get_format(spec).bound(weight, stored.codes, stored.scale, spec)
    off = dequantize(stored.codes, stored.scale, spec).double() - weight.double()
    assert bool((off.abs() <= bound * (1 + 1e-6)).all())


@given(case=searched(), data=st.data())
@settings(max_examples=20)
def test_rows_may_be_cut_and_permuted(
    case: tuple[Tensor, Any, Tensor | None], data: st.DataObject
) -> None:
    weight, spec, importance = case
    fmt = get_format(spec)
    whole, _ = choose_scales(weight, fmt, spec, importance)
    height, _ = spec.group_shape(*weight.shape)
    step = height * data.draw(st.integers(1, 4))
    runs = [weight[top : top + step] for top in range(0, len(weight), step)]
    again = torch.cat([choose_scales(run, fmt, spec, importance)[0] for run in runs])
    assert bits(again) == bits(whole)
    if height == 1:
        order = torch.tensor(data.draw(st.permutations(range(len(weight)))))
        assert bits(choose_scales(weight[order], fmt, spec, importance)[0]) == bits(whole[order])


@given(case=searched(moderate=True), exponent=st.integers(-4, 4), power=st.integers(-40, 40))
@settings(max_examples=20)
def test_powers_of_two_and_signs_change_nothing(
    case: tuple[Tensor, Any, Tensor | None], exponent: int, power: int
) -> None:
    weight, spec, importance = case
    stored = quantize(weight, spec, importance)
    assert stored.scale is not None
    counts = None if importance is None else importance * 2.0**power
    moved = quantize(weight * -(2.0**exponent), spec, counts)
    assert bits(moved.scale) == bits(stored.scale * 2.0**exponent)
    assert torch.equal(moved.codes.float(), -stored.codes.float())


@given(case=searched(moderate=True), data=st.data())
@settings(max_examples=20)
def test_columns_of_a_group_may_be_permuted(
    case: tuple[Tensor, Any, Tensor | None], data: st.DataObject
) -> None:
    """Sums are of whole numbers: no order of additions shows."""
    weight, spec, importance = case
    width = spec.group_shape(*weight.shape)[1]
    order = torch.arange(weight.shape[1])
    for left in range(0, len(order), width):
        inside = order[left : left + width].tolist()
        order[left : left + width] = torch.tensor(data.draw(st.permutations(inside)))
    counts = None if importance is None else importance[order]
    shuffled, _ = choose_scales(weight[:, order], get_format(spec), spec, counts)
    assert bits(shuffled) == bits(choose_scales(weight, get_format(spec), spec, importance)[0])


def test_golden_bytes(kit: Any) -> None:
    golden = json.loads((kit.oracle.GOLDEN / "clip_search.json").read_text())
    assert golden == kit.oracle.golden_clip_search()
    raw = np.frombuffer(bytes.fromhex(golden["weight"]), np.float32)
    weight = torch.from_numpy(raw.reshape(golden["shape"]).copy())
    clipped = 0
    for case in golden["cases"]:
        spec, counts = kit.read_spec(case["spec"]), case["importance"]
        stored = quantize(weight, spec, None if counts is None else torch.tensor(counts))
        assert bits(stored.codes).hex() == case["codes"]
        assert bits(stored.scale).hex() == case["scale"]
        clipped += bits(stored.scale) != bits(quantize(weight, absmax_of(spec)).scale)
    assert 0 < clipped < len(golden["cases"])


@pytest.mark.parametrize(
    ("numbers", "importance", "scale"),
    [
        # One number far out, many at half steps of absmax: clipping it costs more than they gain.
        ([1000.0] + [1.5] * 3, None, 1000 / 127),
        # The column that is clipped counts nothing.
        ([254.0] + [65.0] * 3, [0.0, 1.0, 1.0, 1.0], 1.0),
        # Nothing counts, so every candidate is as good: the largest.
        ([254.0, 3.3, 1.1, 9.9], [0.0] * 4, 2.0),
        # Exact with both: the largest.
        ([127.0, 0.0, 0.0, 0.0], None, 1.0),
        ([0.0] * 4, None, 1.0),
        # Subnormal scales are raised to the smallest normal one: all are the same.
        ([1e-40, -1e-41, 0.0, 1e-40], None, 2.0**-126),
    ],
)
def test_small_cases(numbers: list[float], importance: list[float] | None, scale: float) -> None:
    spec = searching(Int8Channel(format="int8", granularity="channel"), steps=2)
    counts = None if importance is None else torch.tensor(importance)
    stored = quantize(torch.tensor([numbers]), spec, counts)
    assert stored.scale is not None
    assert float(stored.scale) == np.float32(scale)


def test_ratios_go_down_in_equal_steps() -> None:
    assert ClipSearch(kind="clip-search", steps=4).ratios() == (1.0, 0.875, 0.75, 0.625, 0.5)
    assert ClipSearch(kind="clip-search", min_clip_ratio=0.1, steps=1).ratios() == (1.0, 0.1)


@pytest.mark.parametrize("group", [(1, 1), (1, 32), (1, 2048), (128, 128), (1, 1 << 20), (999, 7)])
def test_no_sum_overflows(group: tuple[int, int]) -> None:
    assert group[0] * group[1] * 2 ** accuracy(group) <= 2**61
    assert 2 ** accuracy(group) <= 2**50


def test_a_scale_beyond_its_dtype_is_refused_even_if_a_clipped_one_is_not(kit: Any) -> None:
    spec = searching(kit.spec("int8", "group", "float16"))
    weight = torch.ones(4, 8)
    weight[2, 5] = 65504.0 * 127 * 1.5
    with pytest.raises(ScaleOutOfRange) as refused:
        quantize(weight, spec)
    assert refused.value.index == (2, 1)
