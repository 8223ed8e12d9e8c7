"""mxfp8 and mxfp4: a power of two for each 32 numbers of a row (OCP Microscaling Formats, 1.0).

A scale is the least power of two that clamps no number of its block, ``amax <= largest code *
scale``; with the quantizer ``ocp-floor`` it is that of the specification, section 6.3:
``2^(floor(log2(amax)) - floor(log2(largest code)))``, which clamps up to a fourth (mxfp4) or an
eighth (mxfp8) of the largest number. It is stored as an e8m0 exponent from 2^-127, which blocks of
zeros have, to 2^127, which nothing of float32 needs; code 255 is no number, and refused where it is
read. Dividing by a power of two rounds nothing.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.float8 import Float8Format
from quantrecipe.formats.fp4 import Fp4Format
from quantrecipe.formats.scaled import ScaledFormat, check_block
from quantrecipe.schema.schemes import OcpFloor, ScaledWeight

_MANTISSA: Final = 23
_LARGEST: Final = 254


class _PowersOfTwo(ScaledFormat):
    """Scales that are powers of two; codes are the other base's."""

    def scales(self, amax: Tensor, spec: ScaledWeight) -> Tensor:
        check_block(amax, torch.float32, "a grid of maxima")
        floor = isinstance(spec.quantizer, OcpFloor)
        return _powers_of_two(amax, self.largest_code, floor)

    def operand(self, scale: Tensor) -> Tensor:
        # Exact, and multiplying rounds as dividing by a power of two does.
        return scale.reciprocal()

    def _divide(self, weight: Tensor, operand: Tensor, out: Tensor) -> None:
        torch.mul(weight, operand, out=out)


class MxFp8Format(_PowersOfTwo, Float8Format):
    """mxfp8: fp8 e4m3 codes."""

    def __init__(self) -> None:
        super().__init__(torch.float8_e4m3fn, mantissa=3, first_non_finite=0x7F)
        self.name = "mxfp8"


class MxFp4Format(_PowersOfTwo, Fp4Format):
    """mxfp4: fp4 e2m1 codes, one in a byte."""

    name = "mxfp4"


def _powers_of_two(amax: Tensor, largest_code: float, floor: bool) -> Tensor:
    """The scales of blocks with these maxima (float32), as float8_e8m0fnu.

    With a maximum of ``(1 + f) 2^e`` and a largest code of ``(1 + g) 2^c``, the least power is
    ``2^(e - c)``, or the next where ``f > g``: bits say all there is to say. What they say of
    subnormal maxima is below the smallest scale, as it should be.
    """
    fraction, exponent = math.frexp(largest_code)
    # ``1 - g``, short of the last place: added to ``f`` it carries where ``f > g``.
    carry = 0 if floor else 2**_MANTISSA - 1 - int((2 * fraction - 1) * 2**_MANTISSA)
    power = amax.view(torch.int32).add(carry).bitwise_right_shift_(_MANTISSA).sub_(exponent - 1)
    return power.clamp_(0, _LARGEST).to(torch.uint8).view(torch.float8_e8m0fnu)
