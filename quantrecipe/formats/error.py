"""How far stored weights are from the weights they stand for."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quantrecipe.formats.base import WeightFormat, Workspace
from quantrecipe.formats.grid import absmax
from quantrecipe.schema.schemes import ScaledWeight

# Between these a float32 norm of up to 2^20 values neither overflows nor loses what matters.
_SAFE_NORM: Final = (1e-15, 1e18)


class RowErrors(NamedTuple):
    """What quantizing a row block cost.

    Attributes:
        signal: the sum of ``w^2`` of each row, float64 ``[rows]``.
        noise: the sum of ``(w - w_hat)^2`` of each row, float64 ``[rows]``.
        worst_in_scales: the largest ``abs(w - w_hat) / scale`` of the block.
    """

    signal: Tensor
    noise: Tensor
    worst_in_scales: float


def row_errors(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    fmt: WeightFormat,
    spec: ScaledWeight,
    workspace: Workspace | None = None,
) -> RowErrors:
    """Errors of a row block, from what is stored; a row's sums depend on that row alone.

    Sums are taken in float32, good to about 1e-6 of themselves, and in float64 for rows so large or
    so small that their squares leave float32's range.

    Args:
        weight: float32 ``[rows, in]``, finite.
        codes: its codes.
        scale: its scales as stored.
        fmt: the format of ``spec``.
        spec: how the weight is stored.
        workspace: scratch; its memory is overwritten.
    """
    error = (workspace or Workspace()).like(weight)
    fmt.decode(codes, scale, spec, out=error)
    error.sub_(weight)
    worst = absmax(error, spec.group_shape(*weight.shape)).div_(scale).amax()
    return RowErrors(_squares(weight), _squares(error), float(worst))


def sqnr_db(signal: float | Tensor, noise: float | Tensor) -> float | None:
    """``10 log10(signal / noise)`` in dB; ``None`` where there is no noise at all.

    Tensors are summed exactly first, so the order of rows makes no difference.
    """
    wanted, unwanted = _total(signal), _total(noise)
    if unwanted == 0:
        return None
    return 10 * (math.log10(wanted) - math.log10(unwanted)) if wanted else -math.inf


def _squares(block: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(block, dim=1)
    sums: Tensor = norm.double().square_()
    low, high = torch.aminmax(norm)
    if float(low) < _SAFE_NORM[0] or float(high) > _SAFE_NORM[1]:
        doubtful = (norm < _SAFE_NORM[0]) | (norm > _SAFE_NORM[1])
        # cumsum adds from left to right whatever the shape; sum may split a long row.
        sums[doubtful] = block[doubtful].double().square_().cumsum(1)[:, -1]
    return sums


def _total(values: float | Tensor) -> float:
    return math.fsum(values.flatten().tolist()) if isinstance(values, Tensor) else float(values)
