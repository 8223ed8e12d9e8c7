"""Folded smoothing as arithmetic: in float32, one rounding for each division or product.

What an input comes out of has its rows divided. Where scales are float32 and belong to single rows,
they alone are divided, and codes and their error in scales are those of the weight as it was;
everything else is divided before it is stored.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from quantrecipe.formats.plain import cast, to_float32
from quantrecipe.formats.refusals import (
    Unrepresentable,
    all_finite,
    first_index,
    refuse_non_finite,
)
from quantrecipe.schema.dtypes import PlainDType
from quantrecipe.schema.folds import FoldSite
from quantrecipe.schema.schemes import AnyWeight, ScaledWeight


@dataclass(frozen=True, slots=True, eq=False)
class FoldedFactors:
    """Factors, each with the place where it is folded.

    Attributes:
        folded: site and factors, float32 ``[stop - start]``, on the CPU.
    """

    folded: tuple[tuple[FoldSite, Tensor], ...] = ()

    def factors(self, part: str, module: str) -> Tensor | None:
        """What the columns of a module are multiplied by, float32 ``[in]``; ``None``: nothing."""
        mine = (
            values for site, values in self.folded if site.part == part and module in site.modules
        )
        return next(mine, None)

    def divisors(self, part: str, name: str, rows: int) -> Tensor | None:
        """What the rows of a module or the numbers of a vector are divided by, float32 ``[rows]``.

        ``None`` where nothing is folded into it.
        """
        mine = [each for each in self.folded if each[0].part == part and name in each[0].divided]
        if not mine:
            return None
        found = torch.ones(rows)
        for site, values in mine:
            found[site.start : site.stop] = values
        return found

    def for_names(self, names: Collection[tuple[str, str]]) -> FoldedFactors:
        """Those that these modules and tensors, by part and name, have to do with."""
        return FoldedFactors(
            tuple(
                (site, values)
                for site, values in self.folded
                if any((site.part, one) in names for one in (*site.modules, *site.divided))
            )
        )


class FoldOutOfRange(Unrepresentable):
    """A scale that a folded factor takes out of the range of its dtype."""

    kind = "fold-out-of-range"
    hint = 'Use "apply": "online" for what is folded there.'


def divides_scales(weight: AnyWeight) -> bool:
    """Whether rows stored so are divided by dividing their scales."""
    if not isinstance(weight, ScaledWeight):
        return False
    return weight.granularity in ("channel", "group") and weight.scale_dtype == "float32"


def divide_scales(scales: Tensor, divisors: Tensor) -> Tensor:
    """The scales of rows that are divided.

    Args:
        scales: float32 ``[rows, groups]``.
        divisors: float32 ``[rows]``, on the same device.

    Raises:
        FoldOutOfRange: one becomes infinite, or too small to be a normal number.
    """
    divided = scales / divisors.unsqueeze(1)
    wrong = ~divided.isfinite() | (divided < torch.finfo(torch.float32).smallest_normal)
    index = first_index(wrong)
    if index is not None:
        raise FoldOutOfRange(
            f"scale {float(scales[index])!r}, divided by the factor {float(divisors[index[0]])!r} "
            "that is folded into its row, is no normal float32",
            index,
        )
    return divided


def fold_rows(values: Tensor, factors: Tensor | None, divisors: Tensor | None) -> Tensor:
    """Rows times the factors of their columns, divided by those of the rows.

    Args:
        values: of a plain dtype, ``[rows, in]``, or ``[rows]`` without factors.
        factors: float32 ``[in]``.
        divisors: float32 ``[rows]``.

    Returns:
        float32, in memory of its own.

    Raises:
        NonFinite: a number is not finite, or no longer.
        OutOfRange: a number is beyond float32.
    """
    result = to_float32(values).clone()
    if factors is not None:
        result.mul_(factors)
    if divisors is not None:
        result.div_(divisors.view(-1, *[1] * (result.ndim - 1)))
    if not all_finite(result):
        refuse_non_finite(result)
    return result


def fold_vector(values: Tensor, divisors: Tensor | None, dtype: PlainDType) -> Tensor:
    """A vector divided by factors, if there are any, in a plain dtype.

    Args:
        values: of a plain dtype, ``[n]``.
        divisors: float32 ``[n]``.
        dtype: the dtype of the result.

    Raises:
        NonFinite, OutOfRange: as ``fold_rows`` and ``cast``.
    """
    return cast(values if divisors is None else fold_rows(values, None, divisors), dtype)
