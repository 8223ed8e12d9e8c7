"""Block scales in tiles: where each of them lies, strips of rows, and the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats.arrangement import swizzle, unswizzle

ONE_BYTE = [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu]
shapes = st.tuples(st.integers(1, 300), st.integers(1, 13))


def grid(rows: int, columns: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randint(1, 255, (rows, columns), dtype=torch.uint8, generator=generator).view(
        dtype
    )


@given(shape=shapes)
@settings(max_examples=30)
def test_each_number_lies_where_the_layout_says(shape: tuple[int, int]) -> None:
    """Index by index, from the formula; everything else is 0."""
    rows, columns = shape
    scales = grid(*shape)
    tiles = -(-columns // 4)
    expected = [0] * (-(-rows // 128) * 128 * tiles * 4)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * tiles + c // 4
            place = tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4
            expected[place] = int(scales[r, c])
    stored = swizzle(scales)
    assert stored.shape == (-(-rows // 128) * 128, tiles * 4)
    assert stored.is_contiguous()
    assert stored.flatten().tolist() == expected


@given(shape=shapes, dtype=st.sampled_from(ONE_BYTE))
@settings(max_examples=40)
def test_the_way_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    scales = grid(*shape, dtype)
    found = unswizzle(swizzle(scales), *shape)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.uint8), scales.view(torch.uint8))


@given(shape=shapes)
@settings(max_examples=30)
def test_strips_of_128_rows_are_independent(shape: tuple[int, int]) -> None:
    scales = grid(*shape)
    strips = [swizzle(scales[top : top + 128]) for top in range(0, shape[0], 128)]
    assert torch.equal(torch.cat(strips), swizzle(scales))


def test_padding_is_not_looked_at() -> None:
    stored = swizzle(grid(3, 5))
    stored[stored == 0] = 255
    assert torch.equal(unswizzle(stored, 3, 5), grid(3, 5))


@pytest.mark.parametrize("shape", [(128, 4), (256, 8), (128, 12)], ids=str)
def test_tiles_of_another_grid_are_refused(shape: tuple[int, int]) -> None:
    stored = torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\[129, 9\]"):
        unswizzle(stored, 129, 9)


def test_golden_bytes() -> None:
    """Rows 0, 1, 32 and 127 of a grid of one tile, and its second tile."""
    rows = torch.arange(128)[:, None]
    scales = (rows * 2 + torch.tensor([0, 1, 0, 1, 7])).to(torch.uint8)
    stored = swizzle(scales).flatten()
    assert stored[:12].tolist() == [0, 1, 0, 1, 64, 65, 64, 65, 128, 129, 128, 129]
    assert stored[16:20].tolist() == [2, 3, 2, 3]
    assert stored[508:520].tolist() == [254, 255, 254, 255, 7, 0, 0, 0, 71, 0, 0, 0]


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 5), (400, 18)], ids=str)
def test_agrees_with_comfy_kitchen(shape: tuple[int, int]) -> None:
    peer = pytest.importorskip("comfy_kitchen.float_utils")
    scales = grid(*shape)
    stored = swizzle(scales)
    assert torch.equal(stored, peer.to_blocked(scales, flatten=False))
    assert torch.equal(peer.from_blocked(stored, *shape), scales)
