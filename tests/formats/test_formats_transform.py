"""The compiled transform gives the plain one's bytes, errors and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats import (
    PLAIN,
    NonFinite,
    RowErrors,
    ScaleOutOfRange,
    Unrepresentable,
    get_format,
    quantize,
)
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.plain_transform import PlainTransform
from quantrecipe.formats.scaled import SCALE_DTYPES
from quantrecipe.formats.transform import (
    BlockTransform,
    CompiledTransform,
    block_transform,
)
from quantrecipe.schema.schemes import AnyScaledWeight, PlainWeight, ScaledWeight
from tests.formats.test_formats_clip_search import searched, searching

numba = pytest.importorskip("numba", reason="the extra `fast` is not installed")

SIXTEEN = (torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """A stored weight and what it shall become."""

    source: Any
    target: Any
    codes: Tensor
    scales: Tensor | None
    factors: Tensor | None
    importance: Tensor | None = None


class Result(NamedTuple):
    codes: Tensor
    scales: Tensor
    errors: RowErrors


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def both(case: Case) -> tuple[BlockTransform, BlockTransform]:
    compiled = block_transform(case.source, case.target)
    plain = block_transform(case.source, case.target, prefer_compiled=False)
    assert isinstance(compiled, CompiledTransform)
    assert isinstance(plain, PlainTransform)
    return plain, compiled


def run(transform: BlockTransform, case: Case, size: int | None = None) -> Result:
    """The whole weight in blocks of about ``size`` rows, as a converter does it."""
    target, (rows, columns) = case.target, case.codes.shape
    multiple = math.lcm(*(row_multiple(spec) for spec in (case.source, target)))
    size = rows if size is None else -(-size // multiple) * multiple
    codes = torch.full((rows, columns), 99, dtype=torch.uint8).view(get_format(target).code_dtype)
    scales = torch.full(target.scale_grid(rows, columns), 99.0).to(SCALE_DTYPES[target.scale_dtype])
    blocks = [
        (slice(top, min(rows, top + size)), cut_scales(case, top, size))
        for top in range(0, rows, size)
    ]
    if target.granularity == "tensor":
        maxima = [transform.absmax(block_of(case, cut, grid)) for cut, grid in blocks]
        scales.copy_(get_format(target).scales(torch.stack(maxima).amax(0), target))
    height = target.group_shape(rows, columns)[0]
    errors = [
        transform(
            block_of(case, cut, grid),
            TargetBlock(codes[cut], scales[cut.start // height : -(-cut.stop // height)]),
            case.importance,
        )
        for cut, grid in blocks
    ]
    return Result(
        codes,
        scales,
        RowErrors(
            torch.cat([e.signal for e in errors]),
            torch.cat([e.noise for e in errors]),
            max(e.worst_in_scales for e in errors),
        ),
    )


def block_of(case: Case, cut: slice, grid: Tensor | None) -> SourceBlock:
    return SourceBlock(case.codes[cut], grid, factors=case.factors)


def row_multiple(spec: Any) -> int:
    return get_format(spec).row_multiple(spec) if isinstance(spec, ScaledWeight) else 1


def cut_scales(case: Case, top: int, size: int) -> Tensor | None:
    if case.scales is None:
        return None
    height = case.source.group_shape(*case.codes.shape)[0]
    return case.scales[top // height : -(-(top + size) // height)]


def assert_same(case: Case, size: int | None = None) -> None:
    plain, compiled = both(case)
    try:
        expected = run(plain, case)
    except Unrepresentable as refused:
        assert_refuses_alike(compiled, case, refused)
        return
    found = run(compiled, case)
    assert bits(found.scales) == bits(expected.scales)
    assert bits(found.codes) == bits(expected.codes)
    assert_same_errors(found.errors, expected.errors)
    if size is not None:
        for transform in (plain, compiled):
            again = run(transform, case, size)
            assert bits(again.scales) == bits(found.scales)
            assert bits(again.codes) == bits(found.codes)
            assert_same_errors(again.errors, found.errors)


def assert_same_errors(found: RowErrors, expected: RowErrors) -> None:
    """To the last bit, sums included."""
    assert torch.equal(found.signal, expected.signal)
    assert torch.equal(found.noise, expected.noise)
    assert found.worst_in_scales == expected.worst_in_scales


def assert_refuses_alike(transform: BlockTransform, case: Case, wanted: Unrepresentable) -> None:
    with pytest.raises(type(wanted)) as refused:
        run(transform, case)
    assert str(refused.value) == str(wanted)
    assert refused.value.index == wanted.index


def stored(weight: Tensor, source: Any) -> tuple[Tensor, Tensor | None]:
    """A float32 weight as a source holds it; numbers beyond the source's range become smaller."""
    if isinstance(source, PlainWeight):
        dtype = PLAIN[source.format]
        largest = torch.finfo(dtype).max
        return weight.clamp(-largest, largest).to(dtype), None
    limit = 2.0**20 if source.scale_dtype == "float16" else math.inf
    quantized = quantize(weight.clamp(-limit, limit), source)
    return quantized.codes, quantized.scale


def sources(kit: Any) -> list[Any]:
    return [PlainWeight(format=name) for name in ("bfloat16", "float16", "float32")] + [
        *kit.specs()
    ]


def smoothing(seed: int, columns: int) -> Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(np.exp2(random.uniform(-4, 4, columns)).astype(np.float32))


@given(data=st.data(), size=st.integers(1, 11))
@settings(max_examples=300)
def test_codes_scales_and_errors_are_those_of_the_plain_path(
    data: st.DataObject, size: int, kit: Any
) -> None:
    weight, target = data.draw(kit.cases())
    takes = [s for s in sources(kit) if takes_shape(s, weight)]
    source = data.draw(st.sampled_from(takes))
    codes, scales = stored(weight, source)
    seed = data.draw(st.none() | st.integers(0, 99))
    factors = None if seed is None else smoothing(seed, weight.shape[1])
    assert_same(Case(source, target, codes, scales, factors), size)


def takes_shape(source: Any, weight: Tensor) -> bool:
    return isinstance(source, PlainWeight) or source.refuses(*weight.shape) is None


@given(case=searched(), size=st.integers(1, 11), seed=st.none() | st.integers(0, 99))
@settings(max_examples=50)
def test_a_search_finds_the_scales_of_the_plain_path(
    case: tuple[Tensor, Any, Tensor | None], size: int, seed: int | None
) -> None:
    weight, target, importance = case
    factors = None if seed is None else smoothing(seed, weight.shape[1])
    source = PlainWeight(format="float32")
    assert_same(Case(source, target, weight, None, factors, importance), size)


@pytest.mark.parametrize("columns", [511, 513, 4608, 9000])
def test_a_search_of_wide_rows(columns: int, kit: Any) -> None:
    """Wider than what is searched at a time, with sums of fewer bits."""
    generator = torch.Generator().manual_seed(columns)
    weight = (torch.randn(5, columns, generator=generator) * 0.02).bfloat16()
    importance = torch.rand(columns, generator=generator) ** 4
    source = PlainWeight(format="bfloat16")
    for fmt in ("int8", "float8_e4m3fn"):
        assert_same(Case(source, searching(kit.spec(fmt)), weight, None, None, importance), 2)


def test_every_pair_of_formats(kit: Any) -> None:
    """Every source with every target, over a weight with all that is special in it."""
    weight = torch.randn(7, 4 * 9, generator=torch.Generator().manual_seed(1)) * 0.02
    weight[1] = 0
    weight[2] = torch.arange(-18, 18) * 0.5
    weight[2, 0] = 127
    weight[3] *= 2.0**-130
    weight[4, ::2] = 0
    weight[5] *= 1e4
    for source in sources(kit):
        codes, scales = stored(weight, source)
        for target in kit.specs():
            for factors in (None, smoothing(3, weight.shape[1])):
                assert_same(Case(source, target, codes, scales, factors), 2)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_every_finite_16_bit_number(dtype: torch.dtype, kit: Any) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    every = every[every.isfinite()].view(-1, 8)
    source = PlainWeight(format="bfloat16" if dtype == torch.bfloat16 else "float16")
    for fmt in kit.formats:
        for granularity in ("tensor", "channel", "group" if fmt == "int8" else "block"):
            assert_same(Case(source, kit.spec(fmt, granularity), every, None, None))


@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_every_finite_code(fmt: str, kit: Any) -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(TORCH_DTYPES[fmt])
    every = every[every.float().isfinite()][None].expand(5, -1).contiguous()
    scales = torch.tensor([[1.0], [2.0**-126], [3e-3], [2.0**100], [0.1]])
    for target in kit.specs():
        if target.refuses(*every.shape) is None:
            assert_same(Case(kit.spec(fmt), target, every, scales, None))


@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_rounding_at_and_beside_every_tie(fmt: str, kit: Any) -> None:
    """Half-way between neighbouring codes, and one float32 to either side."""
    top = get_format(fmt).largest_code
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(TORCH_DTYPES[fmt]).float()
    values, _ = codes[codes.isfinite() & (codes.abs() <= top)].sort()
    ties = (values[1:].double() + values[:-1].double()).div(2).float()
    up, down = (torch.nextafter(ties, torch.full_like(ties, x)) for x in (math.inf, -math.inf))
    weight = torch.cat([ties, up, down, values, torch.tensor([-0.0, 0.0, 1e-45, -1e-45])])[None]
    for scale in (1.0, 2.0**-20, 1 / 3, 2.0**-120):
        case = Case(PlainWeight(format="float32"), kit.spec(fmt), weight * scale, None, None)
        assert_same(case)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_every_rounding_of_a_scale(scale_dtype: str, kit: Any) -> None:
    """Maxima whose scales lie on, between and beside the numbers of the scale's dtype."""
    step = 2 ** (13 if scale_dtype == "float16" else 16) // 4
    low = 2.0**-15 if scale_dtype == "float16" else 2.0**-127
    start = torch.tensor(low).view(torch.int32).item()
    grid = torch.arange(20_000, dtype=torch.int32) * step + int(start)
    wanted = torch.cat([grid, grid + 1, grid - 1]).view(torch.float32)
    for fmt in ("int8", "float8_e5m2"):
        amax = wanted.double().mul(get_format(fmt).largest_code).float()[:, None]
        assert bool(amax.isfinite().all())
        source = PlainWeight(format="float32")
        keep = amax[amax[:, 0] < 65504 * get_format(fmt).largest_code]
        assert_same(Case(source, kit.spec(fmt, "channel", scale_dtype), keep, None, None))


@pytest.mark.parametrize(
    "columns", [1, 7, 512, 513, 1023, 1024, 1025, 2049, 4095, 4096, 4608, 5001, 53248]
)
@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn"])
def test_wide_rows(columns: int, fmt: str, kit: Any) -> None:
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)) * 0.02
    for granularity in ("channel", "tensor"):
        source = PlainWeight(format="bfloat16")
        target = kit.spec(fmt, granularity)
        assert_same(Case(source, target, weight.bfloat16(), None, None), 2)


@pytest.mark.parametrize("exponent", [-149, -140, -126, -100, -64, 0, 63, 100, 120])
@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_sums_of_extreme_magnitudes(exponent: int, fmt: str, kit: Any) -> None:
    random = np.random.default_rng(exponent + 200)
    weight = torch.from_numpy(np.ldexp(random.standard_normal((3, 1999)), exponent)).float()
    weight[1, 1:] *= 2.0**-40
    case = Case(PlainWeight(format="float32"), kit.spec(fmt), weight, None, None)
    assert_same(case, 1)


@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("target", ["int8", "float8_e4m3fn"])
def test_refusals_name_the_same_place(source: str, target: str, kit: Any) -> None:
    plain = source in PLAIN
    for granularity in ("tensor", "channel", "group" if target == "int8" else "block"):
        for row, column in ((0, 0), (2, 5), (4, 7)):
            codes, scales = torch.ones(5, 8), None if plain else torch.ones(5, 1)
            stored_codes = codes.to(TORCH_DTYPES[source])
            if plain:
                poison = [math.nan, math.inf, -math.inf]
                stored_codes[row, column] = poison[row % 3]
                stored_codes[4, 7] = math.nan
            elif source == "int8":
                assert scales is not None
                scales[row] = 3e38
                stored_codes[row, column] = 100
            else:
                stored_codes.view(torch.uint8)[row, column] = 0x7F + 0x80 * (row % 2)
            spec = PlainWeight(format=source) if plain else kit.spec(source)  # type: ignore[arg-type]
            case = Case(spec, kit.spec(target, granularity), stored_codes, scales, None)
            for transform in both(case):
                with pytest.raises(NonFinite) as refused:
                    run(transform, case)
                assert refused.value.index == (row, column)
            assert_same(case)


def test_a_scale_that_overflows_is_refused(kit: Any) -> None:
    weight = torch.ones(4, 8)
    weight[2, 5] = 1e9
    target = kit.spec("int8", "group", "float16")
    case = Case(PlainWeight(format="float32"), target, weight, None, None)
    for transform in both(case):
        with pytest.raises(ScaleOutOfRange) as refused:
            run(transform, case)
        assert refused.value.index == (2, 1)


@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_a_given_scale_may_be_too_small(fmt: str, kit: Any) -> None:
    """Codes stop at the largest, of either sign."""
    spec, dtype = kit.spec(fmt, "tensor"), get_format(fmt).code_dtype
    steps = torch.tensor([[0.9, 1.0, 1.01, 1.2, 4.0, 1e20]]) * get_format(fmt).largest_code
    weight, scale = torch.cat([steps, -steps]), torch.ones(1, 1)
    found = []
    for transform in both(Case(PlainWeight(format="float32"), spec, weight, None, None)):
        codes = torch.zeros(2, 6).to(dtype)
        errors = transform(SourceBlock(weight), TargetBlock(codes, scale))
        found.append((bits(codes), errors.worst_in_scales))
    assert found[0] == found[1]


def test_a_product_that_overflows_is_refused_while_encoding_too(kit: Any) -> None:
    codes, scales = torch.full((2, 3), 100, dtype=torch.int8), torch.tensor([[1.0], [3e38]])
    case = Case(kit.spec("int8"), kit.spec("int8", "tensor"), codes, scales, None)
    for transform in both(case):
        with pytest.raises(NonFinite) as refused:
            transform(
                SourceBlock(codes, scales), TargetBlock(torch.empty_like(codes), torch.ones(1, 1))
            )
        assert refused.value.index == (1, 0)


def test_a_code_beyond_float32_is_refused(kit: Any) -> None:
    weight, scale = torch.tensor([[1.0, 2.0], [1.0, 3.4e38]]), torch.tensor([[1.9e38]])
    case = Case(PlainWeight(format="float32"), kit.spec("int8", "tensor"), weight, None, None)
    for transform in both(case):
        with pytest.raises(NonFinite) as refused:
            transform(SourceBlock(weight), TargetBlock(torch.empty(2, 2, dtype=torch.int8), scale))
        assert refused.value.index == (1, 1)


@given(data=st.data())
def test_column_maxima_are_those_of_the_plain_path(data: st.DataObject, kit: Any) -> None:
    weight, target = data.draw(kit.cases())
    source = data.draw(st.sampled_from([s for s in sources(kit) if takes_shape(s, weight)]))
    codes, scales = stored(weight, source)
    found = [torch.full((weight.shape[1],), 1e-3) for _ in range(2)]
    for transform, out in zip(both(Case(source, target, codes, scales, None)), found, strict=True):
        transform.column_absmax(SourceBlock(codes, scales), out)
    assert bits(found[0]) == bits(found[1])


def test_column_maxima_refuse_codes_and_pass_on_what_is_no_number(kit: Any) -> None:
    codes = torch.ones(3, 4).to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[1, 2] = 0xFF
    case = Case(kit.spec("float8_e4m3fn"), kit.spec("int8"), codes, torch.ones(3, 1), None)
    for transform in both(case):
        with pytest.raises(NonFinite) as refused:
            transform.column_absmax(SourceBlock(codes, case.scales), torch.zeros(4))
        assert refused.value.index == (1, 2)
    numbers = torch.tensor([[1.0, math.nan, -math.inf, -2.0]])
    for transform in both(Case(PlainWeight(format="float32"), kit.spec("int8"), *[numbers] * 3)):
        out = torch.zeros(4)
        transform.column_absmax(SourceBlock(numbers), out)
        assert out[[0, 2, 3]].tolist() == [1.0, math.inf, 2.0]
        assert bool(out[1].isnan())


@pytest.mark.parametrize("which", [0, 1], ids=["plain", "compiled"])
def test_threads_share_a_transform(which: int, kit: Any) -> None:
    weight = torch.randn(64, 3000, generator=torch.Generator().manual_seed(5)).bfloat16()
    case = Case(PlainWeight(format="bfloat16"), kit.spec("int8"), weight, None, None)
    transform = both(case)[which]
    expected = run(transform, case)
    parts = [case._replace(codes=weight[top : top + 4]) for top in range(0, 64, 4)] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: run(transform, part).codes, parts))
    for cut in range(0, 64, 16):
        assert bits(torch.cat(found[cut : cut + 16])) == bits(expected.codes)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def blocks(arguments: dict[str, Any]) -> tuple[SourceBlock, TargetBlock]:
    return (
        SourceBlock(arguments["codes_in"], arguments.get("scales_in")),
        TargetBlock(arguments["codes_out"], arguments["scales_out"]),
    )


@pytest.mark.parametrize("change", ["codes_in", "codes_out", "scales_out"])
def test_strided_memory_goes_the_plain_way(change: str, kit: Any) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(6))
    target: AnyScaledWeight = kit.spec("int8", "group")
    case = Case(PlainWeight(format="float32"), target, weight, None, None)
    expected = run(both(case)[0], case)
    arguments: dict[str, Any] = {
        "codes_in": weight,
        "codes_out": torch.empty(6, 8, dtype=torch.int8),
        "scales_out": torch.empty(6, 2),
    }
    arguments[change] = transposed(arguments[change])
    both(case)[1](*blocks(arguments))
    assert bits(arguments["codes_out"]) == bits(expected.codes)
    assert bits(arguments["scales_out"]) == bits(expected.scales)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a | {"codes_out": torch.empty(6, 9, dtype=torch.int8)},
        lambda a: a | {"codes_out": torch.empty(6, 8, dtype=torch.uint8)},
        lambda a: a | {"scales_in": None},
        lambda a: a | {"scales_in": torch.ones(5, 1)},
        lambda a: a | {"scales_out": torch.zeros(1, 1)},
        lambda a: a | {"codes_in": torch.ones(6, 8, dtype=torch.int32)},
    ],
    ids=["shape", "dtype", "no-scales", "grid", "given-scale", "source"],
)
def test_misuse_is_named_and_touches_no_memory(
    spoil: Callable[[dict[str, Any]], dict[str, Any]], kit: Any
) -> None:
    arguments: dict[str, Any] = {
        "codes_in": torch.ones(6, 8, dtype=torch.int8),
        "scales_in": torch.ones(6, 1),
        "codes_out": torch.empty(6, 8, dtype=torch.int8),
        "scales_out": torch.ones(1, 1),
    }
    transform = block_transform(kit.spec("int8"), kit.spec("int8", "tensor"))
    transform(*blocks(arguments))
    with pytest.raises(ValueError, match=r"must be|has scales|without a scale"):
        transform(*blocks(spoil(arguments)))


def test_what_is_not_covered_is_plain(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = block_transform(PlainWeight(format="float64"), kit.spec("int8"))
    assert isinstance(wide, PlainTransform)
    monkeypatch.setattr("quantrecipe.formats.loops.find_spec", lambda name: None)
    without = block_transform(PlainWeight(format="bfloat16"), kit.spec("int8"))
    assert isinstance(without, PlainTransform)
