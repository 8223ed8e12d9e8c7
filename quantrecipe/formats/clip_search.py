"""Scales by search: each group takes, of a grid of clip ratios, the one of the least squared error.

The candidates are ``stored(c amax / largest code)``, for the ratios ``c`` of the quantizer from 1
downwards. Each is tried with the codes that the format gives for it. The error of a group is the
sum of ``importance (w_hat - w)^2`` over its numbers; the least one wins, and of several the largest
ratio. Ratio 1 is absmax, so no group is worse off than with that.

Sums come out the same in any order, and so on any device: they are of whole numbers. With
``float32(w_hat - w)`` divided by the power of two above the group's ``amax`` (then at most 1), and
the importance by the power of two above its largest in the group's columns, a term is
``rint(2^F importance error^2)``, in float64. ``F`` is 50, or less for groups of more than 2048
numbers, so that no sum reaches 2^62 (``accuracy``). Powers of two in weights or in importance
therefore change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.base import WeightFormat, Workspace
from quantrecipe.formats.grid import absmax, tiles
from quantrecipe.schema.schemes import ClipSearch, ScaledWeight

_EXPONENT: Final = 0x7FF << 52
_TWICE_BIAS: Final = 2045 << 52
_NONE_YET: Final = 2**62
_ROUNDING: Final = 2.0**52
_ROUNDING_BITS: Final = (52 + 1023) << 52

# Numbers that stay in a core's cache, with their errors in float64; a GPU would rather have few
# large steps.
_AT_A_TIME: Final = {"cpu": 1 << 18}
_AT_A_TIME_ELSEWHERE: Final = 1 << 24


def choose_scales(
    weight: Tensor,
    fmt: WeightFormat,
    spec: ScaledWeight,
    importance: Tensor | None = None,
    *,
    codes: Tensor | None = None,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The scales of a row block, as the quantizer of ``spec`` chooses them, and their zero points.

    Args:
        weight: float32 ``[rows, in]``.
        fmt: the format of ``spec``.
        spec: how the weight shall be stored; for granularity ``tensor`` the block is all of it.
        importance: what each column's squared errors count, float32 ``[in]``, none negative;
            ``None``: all the same. Absmax looks at none.
        codes: scratch of the codes' shape and dtype.
        workspace: scratch.

    Returns:
        The canonical grid of the block, in ``spec.scale_dtype``; the zero points of the same shape,
        where the format has them.

    Raises:
        NonFinite: the block holds a NaN or an infinity; carries its row and column.
        ScaleOutOfRange: a scale overflows its dtype; carries its row and column in the grid.
    """
    amax = fmt.measure(weight, spec)
    scales = fmt.scales(amax, spec)
    zeros = fmt.zero_points(amax, scales, spec)
    if not isinstance(spec.quantizer, ClipSearch):
        return scales, zeros
    if codes is None:
        codes = torch.empty(weight.shape, dtype=fmt.code_dtype, device=weight.device)
    workspace = workspace or Workspace()
    height, width = spec.group_shape(*weight.shape)
    counts = column_weights(importance, weight, (height, width))
    limit = _AT_A_TIME.get(weight.device.type, _AT_A_TIME_ELSEWHERE)
    step = max(1, limit // (height * weight.shape[1]))
    for first in range(0, len(scales), step):
        grid, rows = slice(first, first + step), slice(first * height, (first + step) * height)
        _search(
            weight[rows],
            amax[..., grid, :],
            fmt,
            spec,
            counts,
            codes[rows],
            workspace,
            scales[grid],
            None if zeros is None else zeros[grid],
        )
    return scales, zeros


def _search(
    weight: Tensor,
    amax: Tensor,
    fmt: WeightFormat,
    spec: ScaledWeight,
    counts: Tensor,
    codes: Tensor,
    workspace: Workspace,
    out: Tensor,
    zeros_out: Tensor | None,
) -> None:
    """Leave the best scales of a run of rows in ``out``, and their zero points beside them."""
    # With zero points ``amax`` is the smallest and the largest number of each group.
    units = _below_one(amax if zeros_out is None else amax.abs().amax(0))
    least = torch.full(out.shape, _NONE_YET, dtype=torch.int64, device=weight.device)
    for scale, zeros in candidates(amax, fmt, spec):
        fmt.encode(weight, scale, spec, codes, zero_point=zeros, workspace=workspace, checked=False)
        error = workspace.like(weight)
        fmt.decode(codes, scale, spec, out=error, zero_point=zeros, checked=False)
        total = _weighted_sums(error.sub_(weight), counts, units, spec.group_shape(*weight.shape))
        better = total < least
        torch.where(better, scale, out, out=out)
        if zeros is not None and zeros_out is not None:
            torch.where(better, zeros, zeros_out, out=zeros_out)
        torch.where(better, total, least, out=least)


def candidates(
    amax: Tensor, fmt: WeightFormat, spec: ScaledWeight
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The scales and zero points that the quantizer of ``spec`` chooses from; absmax's come first.

    Args:
        amax: what ``measure`` says of each scaling group.
        fmt: the format of ``spec``.
        spec: how the weight is stored.

    Raises:
        ScaleOutOfRange: as ``WeightFormat.scales``.
    """
    ratios = spec.quantizer.ratios() if isinstance(spec.quantizer, ClipSearch) else (1.0,)
    for ratio in ratios:
        clipped = amax if ratio == 1 else amax * amax.new_full((), ratio)
        scales = fmt.scales(clipped, spec)
        yield scales, fmt.zero_points(clipped, scales, spec)


def accuracy(group: tuple[int, int]) -> int:
    """``F``: a term is at most ``2^F``, and the sum over a group at most ``2^61``."""
    return min(50, 61 - (group[0] * group[1] - 1).bit_length())


def column_weights(importance: Tensor | None, weight: Tensor, group: tuple[int, int]) -> Tensor:
    """What squared errors of each column are multiplied by, at most ``2^F``: float64 ``[in]``.

    Args:
        importance: as in ``choose_scales``.
        weight: the block ``[rows, in]`` whose device and columns they are for.
        group: rows and columns that share a scale.
    """
    most = 2.0 ** accuracy(group)
    if importance is None:
        columns = weight.shape[1]
        return torch.full((columns,), most, dtype=torch.float64, device=weight.device)
    values, width = importance.double()[None], (1, group[1])
    for (view,), unit in tiles((values,), _below_one(absmax(importance[None], width)), width):
        view.mul_(unit)
    return values[0].mul_(most)


def _below_one(magnitude: Tensor) -> Tensor:
    """The power of two that brings a float32 magnitude into ``[1/2, 1)``; for 0 a huge one."""
    exponent = magnitude.double().view(torch.int64).bitwise_and_(_EXPONENT)
    return (_TWICE_BIAS - exponent).view(torch.float64)


def _weighted_sums(error: Tensor, counts: Tensor, units: Tensor, group: tuple[int, int]) -> Tensor:
    """The sum of the terms of each group, an int64 grid."""
    sums = torch.empty(units.shape, dtype=torch.int64, device=error.device)
    blocks = (error, counts.expand(error.shape))
    for ((off, count), unit), (_, total) in zip(
        tiles(blocks, units, group), tiles(blocks, sums, group), strict=True
    ):
        # No code is further from a number than 0 is; whatever a format does, sums are in range.
        terms = off.double().mul_(unit).square_().clamp_(max=1.0).mul_(count)
        # Beside this, a number has no room for a fraction, and its bits count up in ones.
        whole = terms.add_(_ROUNDING).view(torch.int64).sub_(_ROUNDING_BITS)
        total.copy_(whole.sum((1, 3), keepdim=True))
    return sums
