"""Packing codes into wider numbers and taking them out again; see ``quantrecipe.schema.storage``.

Packed numbers lie in memory as safetensors stores them, little-endian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.schema.storage import Packing


def pack(codes: Tensor, packing: Packing, out: Tensor | None = None) -> Tensor:
    """Pack the codes of each row; bits to spare are 0.

    Args:
        codes: uint8 ``[rows, n]``, each below 16.
        packing: how.
        out: receives the result; contiguous.

    Returns:
        ``[rows, packing.stored(n)]`` in the packing's dtype.

    Raises:
        ValueError: codes of another dtype, or ``out`` does not fit.
    """
    rows, count = _rows(codes, torch.uint8)
    shape = rows, packing.stored(count)
    dtype = TORCH_DTYPES[packing.dtype]
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=codes.device)
    if out.dtype != dtype or out.shape != shape or not out.is_contiguous():
        raise ValueError(f"codes are packed into a contiguous {list(shape)} of {dtype}")
    pairs = _bytes(out)
    half = count // 2
    low, high = _order(packing, codes[:, 0::2], codes[:, 1::2])
    whole = pairs[:, :half]
    torch.bitwise_left_shift(high[:, :half], 4, out=whole)
    whole.bitwise_or_(low[:, :half])
    rest = pairs[:, half:]
    if rest.numel():
        rest.zero_()
        if count % 2:
            last = codes[:, -1]
            rest[:, 0] = last if packing.low_first else last.bitwise_left_shift(4)
    return out


def unpack(stored: Tensor, packing: Packing, count: int, out: Tensor | None = None) -> Tensor:
    """The codes of each row, uint8 ``[rows, count]``, each below 16.

    Args:
        stored: ``[rows, packing.stored(count)]`` in the packing's dtype.
        packing: how it was packed.
        count: codes in a row.
        out: receives the codes.

    Raises:
        ValueError: ``stored`` or ``out`` does not fit.
    """
    rows, width = _rows(stored, TORCH_DTYPES[packing.dtype])
    if width != packing.stored(count):
        raise ValueError(
            f"{count} codes are packed into {packing.stored(count)} numbers, not {width}"
        )
    if out is None:
        out = torch.empty((rows, count), dtype=torch.uint8, device=stored.device)
    if out.dtype != torch.uint8 or out.shape != (rows, count):
        raise ValueError(f"codes are unpacked into {[rows, count]} of torch.uint8")
    pairs = _bytes(stored)[:, : -(-count // 2)]
    first, second = out[:, 0::2], out[:, 1::2]
    low, high = _order(packing, first, second)
    torch.bitwise_and(pairs[:, : low.shape[1]], 0x0F, out=low)
    torch.bitwise_right_shift(pairs[:, : high.shape[1]], 4, out=high)
    return out


def pack_down(codes: Tensor, packing: Packing) -> Tensor:
    """Pack the codes of each column: ``[n, columns]`` to ``[packing.stored(n), columns]``."""
    return pack(codes.T.contiguous(), packing).T.contiguous()


def unpack_down(stored: Tensor, packing: Packing, count: int) -> Tensor:
    """The codes of each column, uint8 ``[count, columns]``."""
    return unpack(stored.T.contiguous(), packing, count).T.contiguous()


def _order(packing: Packing, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Of two codes that share a byte, those in its low and in its high bits."""
    return (first, second) if packing.low_first else (second, first)


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of each row; the same memory where it is contiguous."""
    rows, width = tensor.shape
    return tensor.reshape(-1).view(torch.uint8).view(rows, width * tensor.dtype.itemsize)


def _rows(tensor: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    if tensor.ndim != 2 or tensor.dtype != dtype:
        raise ValueError(
            f"expected a 2-D tensor of {dtype}, not {list(tensor.shape)} of {tensor.dtype}"
        )
    rows, columns = tensor.shape
    return rows, columns
