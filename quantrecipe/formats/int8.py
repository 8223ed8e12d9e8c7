"""int8, symmetric: codes -127 to 127, zero is code 0.

``scale = stored(amax / 127)``, ``code = clamp(rint(weight / scale), -127, 127)`` in float32 from
the scale as stored, a true division, ties to even.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.scaled import ScaledFormat

_LARGEST: Final = 127


class Int8Format(ScaledFormat):
    """int8 codes; a source may hold -128, which is read as -128 and never written."""

    name = "int8"
    code_dtype = torch.int8
    largest_code = float(_LARGEST)

    def _round(self, ratio: Tensor, zero_point: Tensor | None, group: tuple[int, int]) -> None:
        ratio.round_().clamp_(-_LARGEST, _LARGEST)

    def _unpack(
        self, codes: Tensor, out: Tensor, zero_point: Tensor | None, group: tuple[int, int]
    ) -> None:
        out.copy_(codes)

    def _bound(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """``max(s / 2, |w| - Q s) + Q 2^-23 s``.

        Half a step, or what the clamp cuts off; the last term is the float32 rounding of the
        quotient and of the product, each at most ``2^-24 Q s``.
        """
        clipped = weight.abs() - _LARGEST * scale
        return torch.maximum(clipped, scale * 0.5) + _LARGEST * 2.0**-23 * scale
