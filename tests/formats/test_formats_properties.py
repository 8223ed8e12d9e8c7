"""What holds for every weight: symmetries, independence of groups, of cuts and of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats import Workspace, get_format, quantize, row_errors


def bits(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.contiguous().view(torch.uint8)


@given(data=st.data())
@settings(max_examples=100)
def test_requantizing_reproduces_the_codes(data: st.DataObject, kit: Any) -> None:
    weight, spec = data.draw(kit.cases())
    stored = quantize(weight, spec)
    fmt = get_format(spec)
    assert stored.scale is not None
    again = fmt.encode(fmt.decode(stored.codes, stored.scale, spec), stored.scale, spec)
    assert torch.equal(bits(again.float()), bits(stored.codes.float()))


@given(data=st.data(), exponent=st.integers(-4, 4))
def test_powers_of_two_move_to_the_scale(data: st.DataObject, exponent: int, kit: Any) -> None:
    weight, spec = data.draw(kit.cases(moderate=True))
    stored, scaled = quantize(weight, spec), quantize(weight * 2.0**exponent, spec)
    assert stored.scale is not None
    assert torch.equal(bits(scaled.codes), bits(stored.codes))
    assert torch.equal(bits(scaled.scale), bits(stored.scale * 2.0**exponent))


@given(data=st.data())
def test_signs_are_symmetric(data: st.DataObject, kit: Any) -> None:
    weight, spec = data.draw(kit.cases())
    plus, minus = quantize(weight, spec), quantize(-weight, spec)
    assert torch.equal(bits(plus.scale), bits(minus.scale))
    if spec.format == "int8":
        assert torch.equal(plus.codes, -minus.codes)
    else:
        assert torch.equal(bits(plus.codes), bits(minus.codes) ^ 0x80)


@given(data=st.data())
def test_rows_may_be_permuted(data: st.DataObject, kit: Any) -> None:
    weight, spec = data.draw(kit.cases().filter(lambda case: case[1].granularity != "block"))
    order = torch.tensor(data.draw(st.permutations(range(len(weight)))))
    stored, permuted = quantize(weight, spec), quantize(weight[order], spec)
    assert torch.equal(bits(permuted.codes), bits(stored.codes[order]))
    assert stored.scale is not None
    rows = stored.scale if spec.granularity == "tensor" else stored.scale[order]
    assert torch.equal(bits(permuted.scale), bits(rows))


@given(data=st.data())
def test_a_group_does_not_see_the_others(data: st.DataObject, kit: Any) -> None:
    weight, spec = data.draw(kit.cases(moderate=True))
    height, width = spec.group_shape(*weight.shape)
    row = data.draw(st.integers(0, weight.shape[0] - 1)) // height
    column = data.draw(st.integers(0, weight.shape[1] - 1)) // width
    inside = torch.zeros(weight.shape, dtype=torch.bool)
    inside[row * height : (row + 1) * height, column * width : (column + 1) * width] = True
    stored, changed = (
        quantize(weight, spec),
        quantize(torch.where(inside, weight * 3, weight), spec),
    )
    assert torch.equal(bits(changed.codes)[~inside], bits(stored.codes)[~inside])
    assert stored.scale is not None
    assert changed.scale is not None
    moved = (changed.scale != stored.scale).nonzero().tolist()
    assert moved == [[row, column]]


def blocks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def in_blocks(weight: Tensor, spec: Any, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Codes, scales, signal, noise and worst error, in the order a streaming caller works."""
    fmt, workspace = get_format(spec), Workspace()
    size = -(-size // fmt.row_multiple(spec)) * fmt.row_multiple(spec)
    cuts = list(blocks(len(weight), size))
    maxima = [fmt.measure(weight[cut], spec) for cut in cuts]
    if spec.granularity == "tensor":
        maxima = [torch.stack(maxima).amax(0)] * len(cuts)
    scales, results = [fmt.scales(amax, spec) for amax in maxima], []
    codes = torch.empty(weight.shape, dtype=fmt.code_dtype)
    for cut, scale in zip(cuts, scales, strict=True):
        fmt.encode(weight[cut], scale, spec, codes[cut], workspace=workspace)
        results.append(row_errors(weight[cut], codes[cut], scale, spec, workspace))
    return (
        codes,
        scales[0] if spec.granularity == "tensor" else torch.cat(scales),
        torch.cat([result.signal for result in results]),
        torch.cat([result.noise for result in results]),
        max(result.worst_in_scales for result in results),
    )


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@given(data=st.data(), size=st.integers(1, 11))
def test_cuts_make_no_difference(data: st.DataObject, size: int, kit: Any) -> None:
    weight, spec = data.draw(kit.cases())
    whole, cut = in_blocks(weight, spec, len(weight)), in_blocks(weight, spec, size)
    stored = quantize(weight, spec)
    assert torch.equal(bits(whole[0]), bits(stored.codes))
    assert torch.equal(bits(whole[1]), bits(stored.scale))
    for one, other in zip(whole[:4], cut[:4], strict=True):
        assert torch.equal(bits(one), bits(other))
    assert whole[4] == cut[4]


@pytest.mark.parametrize("shape", [(37, 4608), (5, 33000), (3, 53248), (40, 1001)], ids=str)
def test_large_blocks_cuts_and_threads(shape: tuple[int, int], threads: int, kit: Any) -> None:
    """Beyond the sizes at which torch splits work between threads."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 0.02
    for fmt, granularity in (("int8", "channel"), ("float8_e4m3fn", "block")):
        spec = kit.spec(fmt, granularity)
        torch.set_num_threads(1)
        expected = in_blocks(weight, spec, 1)
        torch.set_num_threads(threads)
        for size in (1, 2, 7, 16, len(weight)):
            found = in_blocks(weight, spec, size)
            for one, other in zip(expected[:4], found[:4], strict=True):
                assert torch.equal(bits(one), bits(other))
            assert found[4] == expected[4]


def test_row_multiple_is_the_height_of_a_block(kit: Any) -> None:
    heights = {spec.granularity: get_format(spec).row_multiple(spec) for spec in kit.specs()}
    assert heights == {"tensor": 1, "channel": 1, "group": 1, "block": 3}
