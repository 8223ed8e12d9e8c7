"""Packing codes of 4 bits: what was packed comes out, and where each code lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats.packing import pack, pack_down, unpack, unpack_down
from quantrecipe.schema.storage import PACKINGS, Packing

each_packing = st.sampled_from(list(PACKINGS.values()))


@st.composite
def codes(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)


@given(original=codes(), packing=each_packing)
def test_what_was_packed_comes_out(original: Tensor, packing: Packing) -> None:
    rows, columns = original.shape
    along = pack(original, packing)
    assert tuple(along.shape) == (rows, packing.stored(columns))
    assert torch.equal(unpack(along, packing, columns), original)
    down = pack_down(original, packing)
    assert tuple(down.shape) == (packing.stored(rows), columns)
    assert torch.equal(unpack_down(down, packing, rows), original)


@given(original=codes(), packing=each_packing)
def test_each_code_is_where_the_name_says(original: Tensor, packing: Packing) -> None:
    stored = pack(original, packing)
    bits = 32 if packing.dtype == "int32" else 8
    for row, numbers in zip(original.tolist(), stored.tolist(), strict=True):
        wanted = [0] * len(numbers)
        for place, code in enumerate(row):
            within = place % packing.codes
            shift = 4 * within if packing.low_first else bits - 4 - 4 * within
            wanted[place // packing.codes] |= code << shift
        assert [number % 2**bits for number in numbers] == wanted


def test_a_single_number_in_a_row() -> None:
    """A column of one number has strides of its own making, and no other bytes for it."""
    original = torch.arange(8, dtype=torch.uint8).view(8, 1).expand(8, 3)
    packing = PACKINGS["int32-low-nibble"]
    assert torch.equal(unpack_down(pack_down(original, packing), packing, 8), original)


def test_the_order_of_compressed_tensors() -> None:
    signed = torch.tensor([[-8, -7, 0, 1, 2, 3, 4, 7]], dtype=torch.int8)
    stored = pack((signed + 8).to(torch.uint8), PACKINGS["int32-low-nibble"])
    assert int(stored) % 2**32 == 0xFCBA9810


def test_the_order_of_bitsandbytes() -> None:
    stored = pack(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), PACKINGS["uint8-high-nibble"])
    assert stored.tolist() == [[0x12, 0x34]]


def test_what_does_not_fit_is_refused() -> None:
    packing = PACKINGS["int32-low-nibble"]
    with pytest.raises(ValueError, match=r"expected a 2-D tensor of torch\.uint8"):
        pack(torch.zeros(1, 8), packing)
    with pytest.raises(ValueError, match=r"contiguous \[1, 1\] of torch\.int32"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), packing, torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="9 codes are packed into 2 numbers, not 1"):
        unpack(torch.zeros(1, 1, dtype=torch.int32), packing, 9)
    with pytest.raises(ValueError, match=r"unpacked into \[1, 8\]"):
        unpack(torch.zeros(1, 1, dtype=torch.int32), packing, 8, torch.zeros(1, 8))
