"""What formats with 4-bit codes share: a code is a uint8 from 0 to 15, one for each number."""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.scaled import ScaledFormat, refuse_codes

LAST: Final = 15
"""The last code."""

_IN_CACHE: Final = 1 << 16


class NibbleFormat(ScaledFormat):
    """A format whose codes fill 4 bits; what packs them is the layout's."""

    code_dtype = torch.uint8
    _first_non_finite = LAST + 1

    def _largest_bits(self, codes: Tensor) -> Tensor:
        return codes.amax()

    def _refuse_codes(self, codes: Tensor) -> None:
        refuse_codes(codes, codes > LAST)


def chunks(block: Tensor) -> tuple[Tensor, ...]:
    """The numbers of a contiguous block in order: as many at a time as a core keeps in its cache.

    A GPU would rather have all of them at once.
    """
    flat = block.view(-1)
    return torch.split(flat, _IN_CACHE) if block.device.type == "cpu" else (flat,)


@cache
def table(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, where they stay: a copy to a GPU would have to be waited for."""
    with torch.inference_mode(False):  # who comes next may not be in inference mode
        return torch.tensor(numbers, dtype=dtype, device=device)


def look_up(levels: tuple[float, ...], codes: Tensor, out: Tensor) -> None:
    """What each of the codes stands for, float32 into ``out``; only the low 4 bits count."""
    numbers = table(levels, torch.float32, codes.device)
    for chunk, target in zip(chunks(codes), chunks(out), strict=True):
        torch.index_select(numbers, 0, chunk.bitwise_and(LAST).int(), out=target)
