"""nvfp4: fp4 codes, an fp8 scale for each 16 numbers of a row, a float32 scale over all of them.

The scale over all is ``amax / (448 * 6)``, that of a block ``e4m3(min(amax of the block / 6 / scale
over all, 448))``, and ``scale over all * block scale`` in float32 is what codes are computed with
and multiplied by: the numbers of comfy-kitchen. A block whose fp8 scale is 0 has codes 0. A
weight of zeros has 1 as its scale over all, and none is below the smallest normal float32.

compressed-tensors stores ``1 / (scale over all)``, as a divisor, and divides by it: its float32
scales are within 2^-22 of these. Where a block scale would be 0 it stores 0.125.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.fp4 import LARGEST, Fp4Format
from quantrecipe.formats.scaled import check_block
from quantrecipe.schema.schemes import ScaledWeight

_LARGEST_SCALE: Final = 448.0


class NvFp4Format(Fp4Format):
    """nvfp4 codes, one in a byte; grids are float32, both levels of scales multiplied."""

    name = "nvfp4"

    def scales(self, amax: Tensor, spec: ScaledWeight) -> Tensor:
        return multiplied(*block_scales(amax))

    def _divide(self, weight: Tensor, operand: Tensor, out: Tensor) -> None:
        torch.div(weight, operand, out=out)
        out.masked_fill_(operand == 0, 0.0)


def block_scales(amax: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of a whole weight.

    Args:
        amax: the absolute maxima of all of its blocks, a float32 grid of finite numbers.

    Returns:
        The grid of block scales, float8_e4m3fn; what multiplies them, float32 ``[1]``.
    """
    check_block(amax, torch.float32, "a grid of maxima")
    # Tensors on the same device: torch may multiply by the reciprocal of a Python number.
    largest = amax.amax().view(1)
    over_all = largest / largest.new_full((1,), _LARGEST_SCALE * LARGEST)
    over_all.clamp_(min=torch.finfo(torch.float32).smallest_normal)
    over_all.masked_fill_(largest == 0, 1.0)
    wanted = torch.div(amax, amax.new_full((), LARGEST)).div_(over_all)
    return wanted.clamp_(max=_LARGEST_SCALE).to(torch.float8_e4m3fn), over_all


def multiplied(scale: Tensor, over_all: Tensor) -> Tensor:
    """``over_all * scale``, the float32 grid of both levels."""
    return scale.float().mul_(over_all)
