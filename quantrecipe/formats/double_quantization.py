"""Scales stored as 8-bit codes: less their mean, in blocks of 256 (QLoRA, arXiv 2305.14314).

The codes are those of dynamic tree quantization (arXiv 2110.02861, section 2.1, with 7 bits of
exponent at most): a sign, ``z`` zeros that stand for ``10^-z``, a one, and the remaining bits in
equal steps over [0.1, 1]. Every byte is that of bitsandbytes on a CPU with one thread:

* the mean is a float32 sum in the order of torch's (``_sum``), whatever the number of threads;
* a number is multiplied by the reciprocal of the largest of its 256, and its code is that of the
  nearest of 65,536 equal steps over [-1, 1] (``_nearest``), so that numbers within 2^-16 of the
  middle between two codes may get either. Where there is nothing but zeros, the code is 0.

Numbers are ``(map[code] * maximum) + mean``.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.refusals import ScaleOutOfRange, first_index
from quantrecipe.formats.scaled import check_block

BLOCK: Final = 256
"""Scales that share a maximum, counted row after row."""

_EXPONENTS: Final = 7
_STEPS: Final = 65535
# How torch adds: 8 numbers at a time, in 4 sums that take turns, on 4 levels.
_WIDTH: Final = 8
_TURNS: Final = 4
_LEVELS: Final = 4


@cache
def dynamic_map() -> Tensor:
    """What each 8-bit code stands for, float32 ``[256]``, ascending from -0.993 to 1.

    Intervals are halved in float32, their ends rounded once from float64.
    """
    numbers = [torch.zeros(1), torch.ones(1)]
    first, last = torch.tensor([0.1, 1.0])
    for exponent in range(_EXPONENTS):
        count = 2**exponent
        step = ((last - first) / count).double()
        index = torch.arange(count + 1, dtype=torch.float64)
        up, down = first.double() + step * index, last.double() - step * (count - index)
        ends = torch.where(index < (count + 1) // 2, up, down).float()
        middles = (ends[:-1] + ends[1:]) / 2
        magnitude = middles * 10.0 ** (exponent - _EXPONENTS + 1)
        numbers += [magnitude, -magnitude]
    return torch.cat(numbers).sort().values


@cache
def _map_on(device: torch.device) -> Tensor:
    return dynamic_map().to(device)


@cache
def _nearest() -> Tensor:
    """The code of each of the 65,536 steps from -1 to 1, uint8: that of the nearest number."""
    numbers = dynamic_map()
    steps = torch.arange(_STEPS + 1, dtype=torch.float64) / (_STEPS / 2) - 1
    return torch.bucketize(steps.float(), (numbers[:-1] + numbers[1:]) / 2).to(torch.uint8)


def compress(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of a whole weight as 8-bit codes.

    Args:
        scales: a float32 grid.

    Returns:
        Codes, uint8 of the shape of ``scales``; the maximum of each 256, float32; the mean, float32
        ``[1]``.

    Raises:
        ScaleOutOfRange: there is no mean in float32.
    """
    check_block(scales, torch.float32, "a grid of scales")
    flat = scales.flatten()
    mean = _sum(flat).view(1) / flat.new_full((1,), flat.numel())
    if not bool(torch.isfinite(mean)):
        index = first_index(scales == scales.amax())
        assert index is not None
        raise ScaleOutOfRange(
            f"with scale {float(scales[index])!r} the sum of scales is too large for float32", index
        )
    less = flat - mean
    blocks = -(-flat.numel() // BLOCK)
    rows = torch.nn.functional.pad(less, (0, blocks * BLOCK - flat.numel())).view(blocks, BLOCK)
    maxima = rows.abs().amax(1)
    ratio = rows * maxima.reciprocal()[:, None]
    half = ratio.new_full((), 0.5)
    place = ratio.add_(1.0).mul_(_STEPS / 2).add_(half).nan_to_num_(nan=0.0).clamp_(0, _STEPS)
    codes = _nearest().to(flat.device)[place.int()].view(-1)[: flat.numel()]
    return codes.view(scales.shape), maxima, mean


def decompress(codes: Tensor, maxima: Tensor, mean: Tensor) -> Tensor:
    """The scales of a whole weight from ``compress``: a float32 grid, of any sign.

    Args:
        codes: uint8 ``[out, groups]``.
        maxima: float32 ``[ceil(out * groups / 256)]``.
        mean: float32 ``[1]``.

    Raises:
        ValueError: these do not fit together.
    """
    check_block(codes, torch.uint8, "a grid of 8-bit codes")
    blocks = -(-codes.numel() // BLOCK)
    if tuple(maxima.shape) != (blocks,) or mean.numel() != 1:
        raise ValueError(
            f"{codes.numel()} scales have {blocks} maxima and one mean, "
            f"not {list(maxima.shape)} and {list(mean.shape)}"
        )
    flat = _map_on(codes.device)[codes.flatten().int()]
    each = maxima.repeat_interleave(BLOCK)[: codes.numel()]
    return flat.mul_(each).add_(mean).view(codes.shape)


def _sum(numbers: Tensor) -> Tensor:
    """The sum of a float32 vector, with the roundings of torch on a CPU with one thread.

    32 columns are added from top to bottom, in runs, and runs of runs, of ``2^power`` (pairwise
    summation, Higham 1993, with a wide base); then come what is left of columns, 4 groups of them,
    what is left of numbers, and the last 8. Written out, the bits are the same everywhere.
    """
    wide = _WIDTH if len(numbers) >= _WIDTH else 1
    vectors = len(numbers) // wide
    rows = vectors // _TURNS
    whole = numbers[: rows * _TURNS * wide].view(rows, _TURNS * wide)
    turns = _cascade(whole).view(_TURNS, wide)
    for vector in numbers[rows * _TURNS * wide : vectors * wide].view(-1, wide):
        turns[0].add_(vector)
    for turn in turns[1:]:
        turns[0].add_(turn)
    total = numbers.new_zeros(())
    for number in (*numbers[vectors * wide :], *turns[0]):
        total = total + number
    return total


def _cascade(rows: Tensor) -> Tensor:
    """The sum of the rows of a matrix: runs, runs of runs, and what is left of each."""
    run = 1 << max(4, (max(len(rows), 1) - 1).bit_length() // _LEVELS)
    total = rows.new_zeros(rows.shape[1])
    for level in range(_LEVELS):
        last = level == _LEVELS - 1
        kept = 0 if last else len(rows) - len(rows) % run
        total.add_(_down(rows[kept:]))
        rows = _down(rows[:kept].view(-1, run, rows.shape[1]).transpose(0, 1))
    return total


def _down(rows: Tensor) -> Tensor:
    """``rows[0] + rows[1] + ...``, one after the other."""
    total = rows.new_zeros(rows.shape[1:])
    for row in rows:
        total.add_(row)
    return total
