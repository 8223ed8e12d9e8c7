"""How far numbers are from others, summed up block by block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantrecipe.evaluate.comparison.records import Rounding
from quantrecipe.formats import sqnr_db
from quantrecipe.formats.error import sums_of_squares
from quantrecipe.formats.refusals import all_finite, first_index


class Gap:
    """The sums over the blocks so far: what ``formats.error`` computes, of any two blocks.

    Sums of a row depend on that row alone, so they are the same for any cut into blocks.

    Attributes:
        worst: the largest ``abs(b - a)``; ``None`` once a difference was not finite.
        at: the block's offset, row and column of it, or of the first that was not finite.
    """

    def __init__(self) -> None:
        self._signal: list[float] = []
        self._noise: list[float] = []
        self.worst: float | None = 0.0
        self.at: tuple[int, int, int] | None = None

    def take_in(self, a: Tensor, b: Tensor, offset: int = 0) -> None:
        """Add a block ``[rows, columns]`` of each, float32 or float64.

        Infinities and NaNs that both have are no difference, and left out of all sums.
        """
        if self.worst is None:
            return
        if a.dtype != b.dtype:
            # float64 is rounded to what it is compared with, as it is before it is quantized.
            a, b = a.float(), b.float()
        error = b - a
        if not all_finite(error):
            error = b.double() - a.double()  # two large float32 may differ by more than one holds
            none = ~torch.isfinite(error)
            shared = (a == b) | (torch.isnan(a) & torch.isnan(b))
            broken = first_index(none & ~shared)
            if broken is not None:
                self.worst, self.at = None, (offset, broken[0], broken[1])
                return
            error = error.masked_fill(none, 0.0)
            a = a.masked_fill(none, 0.0)
        self._signal += sums_of_squares(a).tolist()
        self._noise += sums_of_squares(error).tolist()
        size = error.abs_()
        largest = float(size.amax())
        if largest > self.worst:
            row, column = divmod(int(size.argmax()), size.shape[1])
            self.worst, self.at = largest, (offset, row, column)

    def sqnr_db(self) -> float | None:
        """As ``Distance.sqnr_db``."""
        if self.worst is None:
            return None
        return sqnr_db(math.fsum(self._signal), math.fsum(self._noise))


class Rounded:
    """Whether plain numbers in two dtypes are those of the other, rounded."""

    def __init__(self) -> None:
        self._b_is = self._a_is = True

    def take_in(self, a: Tensor, b: Tensor) -> None:
        """Look at a block of each, in their own dtypes."""
        self._b_is = self._b_is and _is_cast(a, b)
        self._a_is = self._a_is and _is_cast(b, a)

    def found(self) -> Rounding | None:
        """How they go together; ``None``: they do not."""
        if self._a_is and self._b_is:
            return "lossless"
        if self._b_is:
            return "b-rounded"
        return "a-rounded" if self._a_is else None


def _is_cast(source: Tensor, cast: Tensor) -> bool:
    """Whether ``cast`` is ``source`` rounded as ``formats.plain`` does, bit for bit.

    A number that became an infinity was not rounded. One NaN is as good as another.
    """
    if source.dtype == torch.float64 and cast.dtype != torch.float32:
        wanted = source.float().to(cast.dtype)
    else:
        wanted = source.to(cast.dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[cast.dtype.itemsize]
    alike = wanted.view(integer) == cast.view(integer)
    alike |= torch.isnan(wanted) & torch.isnan(cast)
    alike &= ~(torch.isinf(cast) & torch.isfinite(source))
    return bool(alike.all())
