"""int4: codes 0 to 15, symmetric about 8 or counted from a zero point of each group.

Symmetric: ``scale = stored(amax / 7)``, ``code = clamp(rint(weight / scale), -7, 7) + 8``.
Asymmetric: ``scale = stored((high - low) / 15)`` for a range that always includes 0,
``zero = clamp(rint(-low / scale), 0, 15)``, ``code = clamp(rint(weight / scale) + zero, 0, 15)``.
All in float32 from the scale as stored, with true divisions, ties to even; so 0 is exact.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.grid import extremes, tiles
from quantrecipe.formats.nibbles import LAST, NibbleFormat
from quantrecipe.formats.refusals import all_finite, refuse_non_finite
from quantrecipe.formats.scaled import check_block, stored_scales
from quantrecipe.schema.schemes import ScaledWeight

_LARGEST: Final = 7
_ZERO: Final = 8


class Int4Format(NibbleFormat):
    """int4 codes, one in a byte; a layout packs several into one stored number.

    A symmetric source may hold code 0, which is read as -8 and never written.
    """

    name = "int4"
    largest_code = float(_LARGEST)
    _largest_level = float(LAST)

    def measure(self, weight: Tensor, spec: ScaledWeight) -> Tensor:
        if not spec.has_zero_points:
            return super().measure(weight, spec)
        check_block(weight, torch.float32, "a weight")
        found = extremes(weight, spec.group_shape(*weight.shape))
        if not all_finite(found):
            refuse_non_finite(weight)
        found[0].clamp_(max=0)
        found[1].clamp_(min=0)
        return found

    def scales(self, amax: Tensor, spec: ScaledWeight) -> Tensor:
        if not spec.has_zero_points:
            return super().scales(amax, spec)
        return stored_scales(amax[1] - amax[0], float(LAST), spec)

    def zero_points(self, amax: Tensor, scale: Tensor, spec: ScaledWeight) -> Tensor | None:
        if not spec.has_zero_points:
            return None
        below = torch.div(amax[0].neg(), scale.float())
        return below.round_().clamp_(0, LAST).to(torch.uint8)

    def middle(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The codes that stand for 0, float32 of the shape of the scales."""
        if zero_point is None:
            return torch.full(scale.shape, float(_ZERO), device=scale.device)
        return zero_point.float()

    def first(self, spec: ScaledWeight) -> int:
        """The smallest code that is written."""
        return 0 if spec.has_zero_points else _ZERO - _LARGEST

    def levels(self, codes: Tensor, zero_point: Tensor | None, group: tuple[int, int]) -> Tensor:
        found = codes.to(torch.int8)
        if zero_point is None:
            return found.sub_(_ZERO)
        for (view,), zero in tiles((found,), zero_point.to(torch.int8), group):
            view.sub_(zero)
        return found

    def _round(self, ratio: Tensor, zero_point: Tensor | None, group: tuple[int, int]) -> None:
        ratio.round_()
        if zero_point is None:
            ratio.clamp_(-_LARGEST, _LARGEST).add_(_ZERO)
            return
        for (view,), zero in tiles((ratio,), zero_point.float(), group):
            view.add_(zero)
        ratio.clamp_(0, LAST)

    def _unpack(
        self, codes: Tensor, out: Tensor, zero_point: Tensor | None, group: tuple[int, int]
    ) -> None:
        out.copy_(self.levels(codes, zero_point, group))

    def _bound(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """``max(s / 2, |w| - 7 s) + 2^-20 s``.

        With a zero point ``z`` what is cut off is ``max(w - (15 - z) s, -w - z s)``. The
        last term is the float32 rounding of the quotient and of the product: each at most
        ``2^-24`` of ``15 s``, or of ``16 s`` where a quotient lies between the last two codes.
        """
        if zero_point is None:
            clipped = weight.abs() - _LARGEST * scale
        else:
            above = weight - (LAST - zero_point) * scale
            clipped = torch.maximum(above, -weight - zero_point * scale)
        return torch.maximum(clipped, scale * 0.5) + 2.0**-20 * scale
