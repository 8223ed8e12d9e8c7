"""Rotation by a regular Hadamard matrix: outliers of a few columns are spread over a block of them.

Input features are taken in blocks of ``size`` (a power of 4), and each block is multiplied by
``H = 2^-k R (x) ... (x) R``, ``k`` factors, ``size = 4^k``, where ``(x)`` is the Kronecker product
and ``R`` is the regular Hadamard matrix of order 4 (every row and column has the same sum):

    R = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]

``H`` is symmetric and orthonormal, so it is its own inverse, and ``(x H) (W H)^T = x W^T``. This is
the matrix of ConvRot; QuaRot rotates by Hadamard matrices that are not regular.

``rotate_`` takes ``k`` steps of butterflies with the strides 1, 4, 16, ...: four numbers ``a, b, c,
d`` that are a stride apart become

    (a + b) + (c - d), (a + b) - (c - d), (c + d) + (a - b), (c + d) - (a - b)

and everything is multiplied by ``2^-k`` at the end. Each operation is one rounding of float32 (or
float64), in this order, so the bits are the same on every device and however rows are cut.

An element passes through two additions a step. With the unit roundoff ``u`` and the block ``x``
that it comes from, its error is at most ``((1 + u)^(2k) - 1) |x|_1 / 2^k``, about ``2 k u sqrt(n)``
times the root mean square of a block of ``n``; the multiplication is exact but for subnormal
numbers, where it adds half of the smallest one. A block whose magnitudes add up to more than
float32 holds becomes infinite or NaN.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

_ELEMENTS_AT_A_TIME: Final = 1 << 16
"""What stays in a core's cache from one step to the next."""


def rotate_(values: Tensor, size: int) -> Tensor:
    """Multiply every block of ``size`` columns by ``H``, in place; twice is the identity.

    Args:
        values: float32 or float64 ``[..., in]``, contiguous; ``in`` is a multiple of ``size``.
        size: of the blocks, a power of 4.

    Returns:
        ``values``.
    """
    steps = (size.bit_length() - 1) // 2
    if size < 4 or size != 4**steps or values.shape[-1] % size:
        raise ValueError(f"{values.shape[-1]} columns cannot be rotated in blocks of {size}")
    flat = values.view(-1)
    for piece in (flat,) if values.is_cuda else torch.split(flat, _ELEMENTS_AT_A_TIME):
        for step in range(steps):
            _butterflies(piece.view(-1, 4, 4**step))
        piece.mul_(0.5**steps)
    return values


def _butterflies(blocks: Tensor) -> None:
    a, b, c, d = blocks.unbind(1)
    upper, lower = a + b, c - d
    left, right = c + d, a - b
    torch.add(upper, lower, out=a)
    torch.sub(upper, lower, out=b)
    torch.add(left, right, out=c)
    torch.sub(left, right, out=d)


@cache
def hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``H`` as a matrix, ``[size, size]``: every entry is ``+-2^-k``, exact in every float dtype.

    Args:
        size: a power of 4.
        device: where it shall be; it is made there.
        dtype: of the entries.
    """
    index = torch.arange(size, device=device)
    # R is -1 where the two base-4 digits add up to 3: where both of their bits differ.
    differ = index[:, None] ^ index
    differ &= differ >> 1
    negative = torch.zeros_like(differ)
    for step in range((size.bit_length() - 1) // 2):
        negative ^= (differ >> 2 * step) & 1
    return (1 - 2 * negative).to(dtype).div_(size**0.5)
