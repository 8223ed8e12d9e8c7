"""How far stored weights are from the weights they stand for."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quantrecipe.formats.base import WeightFormat, Workspace
from quantrecipe.formats.grid import absmax
from quantrecipe.formats.refusals import refuse_non_finite
from quantrecipe.schema.schemes import ScaledWeight

LANES: Final = 1024
"""Partial sums of a row: column ``c`` goes to lane ``c % LANES``."""

# Rows of float64 that stay in a core's cache; a GPU would rather have few large steps.
_AT_A_TIME: Final = {"cpu": 1 << 17}
_AT_A_TIME_ELSEWHERE: Final = 1 << 24


class RowErrors(NamedTuple):
    """What quantizing a row block cost.

    Attributes:
        signal: the sum of ``w^2`` of each row, float64 ``[rows]``.
        noise: the sum of ``(w - w_hat)^2`` of each row, float64 ``[rows]``.
        worst_in_scales: the largest ``abs(w - w_hat) / scale`` of the block; where scales lie in
            records, divided by the largest magnitude of its group instead.
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
    *,
    zero_point: Tensor | None = None,
    checked: bool = True,
) -> RowErrors:
    """Errors of a row block, from what is stored; a row's sums depend on that row alone.

    They are ``sums_of_squares`` of the float32 weight and of ``float32(w_hat - w)``.

    Args:
        weight: float32 ``[rows, in]``, finite.
        codes: its codes.
        scale: its scales as stored.
        fmt: the format of ``spec``.
        spec: how the weight is stored.
        workspace: scratch; its memory is overwritten.
        zero_point: its zero points, where the format has them.
        checked: false if codes and scales are known to be numbers (see ``WeightFormat.decode``).

    Raises:
        NonFinite: a code times its scale is no finite number; carries its row and column.
    """
    error = (workspace or Workspace()).like(weight)
    fmt.decode(codes, scale, spec, out=error, zero_point=zero_point, checked=checked)
    error.sub_(weight)
    found = errors_of(error, weight, scale, spec)
    if not math.isfinite(found.worst_in_scales):
        # Codes are rounded: with a large scale, to more than float32 holds.
        refuse_non_finite(fmt.decode(codes, scale, spec, zero_point=zero_point, checked=False))
    return found


def errors_of(error: Tensor, weight: Tensor, scale: Tensor, spec: ScaledWeight) -> RowErrors:
    """``row_errors`` from ``error``, which is ``float32(w_hat - w)``."""
    group = spec.group_shape(*weight.shape)
    # Records do not show their scales: then errors are told in the group's largest numbers.
    divisor = scale.float().abs() if spec.has_scales else absmax(weight, group)
    # A scale of 0 is that of zeros, which are exact, or next to nothing beside those of other
    # groups; one that is stored in two levels may be negative.
    worst = absmax(error, group).div_(divisor.masked_fill(divisor == 0, 1.0)).amax()
    return RowErrors(sums_of_squares(weight), sums_of_squares(error), float(worst))


def sums_of_squares(block: Tensor) -> Tensor:
    """The sum of squares of each row in float64, in one order wherever it is computed.

    Lane ``l`` of ``LANES`` takes columns ``l``, ``l + LANES``, ... from left to right; then the
    upper half of the lanes is added to the lower half until one is left. A square of a float32 is
    exact in float64, so fused multiply-adds change nothing.

    Args:
        block: float32 ``[rows, in]``.

    Returns:
        float64 ``[rows]``.
    """
    rows, columns = block.shape
    # Lanes that no column falls into are zero, and halving them away adds zeros: leave them out.
    lanes = min(LANES, 1 << (columns - 1).bit_length())
    step = max(1, _AT_A_TIME.get(block.device.type, _AT_A_TIME_ELSEWHERE) // lanes)
    sums = torch.empty(rows, dtype=torch.float64, device=block.device)
    for top in range(0, rows, step):
        sums[top : top + step] = _folded(block[top : top + step], lanes)
    return sums


def _folded(block: Tensor, lanes: int) -> Tensor:
    sums = torch.zeros(len(block), lanes, dtype=torch.float64, device=block.device)
    for left in range(0, block.shape[1], lanes):
        numbers = block[:, left : left + lanes].double()
        sums[:, : numbers.shape[1]].addcmul_(numbers, numbers)
    while lanes > 1:
        lanes //= 2
        sums = sums[:, :lanes] + sums[:, lanes:]
    return sums[:, 0]


def sqnr_db(signal: float | Tensor, noise: float | Tensor) -> float | None:
    """``10 log10(signal / noise)`` in dB; ``None`` where there is no noise at all.

    Tensors are summed exactly first, so the order of rows makes no difference.
    """
    wanted, unwanted = _total(signal), _total(noise)
    if unwanted == 0:
        return None
    return 10 * (math.log10(wanted) - math.log10(unwanted)) if wanted else -math.inf


def _total(values: float | Tensor) -> float:
    return math.fsum(values.flatten().tolist()) if isinstance(values, Tensor) else float(values)
