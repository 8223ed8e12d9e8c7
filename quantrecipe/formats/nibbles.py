"""What formats with 4-bit codes share: a code is a uint8 from 0 to 15, one for each number."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.scaled import ScaledFormat, refuse_codes

LAST: Final = 15
"""The last code."""


class NibbleFormat(ScaledFormat):
    """A format whose codes fill 4 bits; what packs them is the layout's."""

    code_dtype = torch.uint8
    _first_non_finite = LAST + 1

    def _largest_bits(self, codes: Tensor) -> Tensor:
        return codes.amax()

    def _refuse_codes(self, codes: Tensor) -> None:
        refuse_codes(codes, codes > LAST)
