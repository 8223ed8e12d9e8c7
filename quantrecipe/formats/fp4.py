"""fp4 e2m1: codes 0 to 15, a sign, two bits of exponent and one of mantissa, up to 6.

The element format of mxfp4 and nvfp4 (OCP Microscaling Formats 1.0, section 5.3.3). A quotient is
clamped to +-6, then rounded to the nearest level; of two equally near, the one with an even code is
taken, as comfy-kitchen and compressed-tensors do. A negative number has a negative code even where
it is rounded to zero, and so has -0.0: zeros keep their sign.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.nibbles import NibbleFormat, chunks, look_up, table

_MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

LEVELS: Final = _MAGNITUDES + tuple(-magnitude for magnitude in _MAGNITUDES)
"""What each code stands for, times the scale."""

LARGEST: Final = 6.0

_SIGN: Final = -0x80000000
_MAGNITUDE: Final = 0x7FFFFFFF
_EXPONENT: Final = 0x7F800000
_ONE: Final = 127 << 23
# One bit of mantissa is left of 23.
_SHIFT: Final = 22


_E4M3: Final = tuple(torch.tensor(LEVELS).to(torch.float8_e4m3fn).view(torch.uint8).tolist())


def as_e4m3(codes: Tensor) -> Tensor:
    """What codes stand for as float8_e4m3fn, which has every one of these numbers.

    Args:
        codes: uint8, each below 16.
    """
    patterns = table(_E4M3, torch.uint8, codes.device)
    found = torch.index_select(patterns, 0, codes.reshape(-1).int())
    return found.view(codes.shape).view(torch.float8_e4m3fn)


class Fp4Format(NibbleFormat):
    """A format of e2m1 codes, one in a byte; a layout packs two into one."""

    largest_code = LARGEST
    _largest_level = LARGEST

    def levels(self, codes: Tensor, zero_point: Tensor | None, group: tuple[int, int]) -> Tensor:
        out = torch.empty(codes.shape, device=codes.device)
        self._unpack(codes, out, zero_point, group)
        return out

    def _round(self, ratio: Tensor, zero_point: Tensor | None, group: tuple[int, int]) -> None:
        for chunk in chunks(ratio):
            _round(chunk)

    def _unpack(
        self, codes: Tensor, out: Tensor, zero_point: Tensor | None, group: tuple[int, int]
    ) -> None:
        look_up(LEVELS, codes, out)

    def _bound(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """``max(min(max(|w| / 5, s / 4), s), |w| - 6 s)``, plus float32 rounding.

        The worst relative error is at the ties above powers of two (1.25, 2.5 and 5 become 1, 2
        and 4); below ``s`` levels are half of ``s`` apart, below ``6 s`` at most ``2 s``. Quotient
        and product each round by ``2^-24``, and by half the smallest subnormal where they are.
        """
        magnitude = weight.abs()
        # A tensor on the same device: torch may multiply by the reciprocal of a Python number.
        relative = magnitude / magnitude.new_full((), 5.0)
        inside = torch.minimum(torch.maximum(relative, scale * 0.25), scale)
        clipped = magnitude - LARGEST * scale
        slack = 2.0**-22 * magnitude + 2.0**-24 * scale + 2.0**-149
        return torch.maximum(inside, clipped) + slack


def _round(ratio: Tensor) -> None:
    """Quotients, contiguous float32, become codes in place.

    Added to a power of two 22 places above its own, a magnitude is rounded to the step of the
    levels around it, ties to even: the last place of the sum counts those steps.
    """
    bits = ratio.view(torch.int32)
    sign = bits.bitwise_and(_SIGN).bitwise_right_shift_(28).bitwise_and_(8)
    bits.bitwise_and_(_MAGNITUDE)
    ratio.clamp_(max=LARGEST)
    below = bits.bitwise_and(_EXPONENT).clamp_(min=_ONE)
    step = below.add(_SHIFT << 23)
    ratio.add_(step.view(torch.float32))
    code = bits.sub_(step).add_(below.sub_(_ONE).bitwise_right_shift_(_SHIFT))
    ratio.copy_(code.bitwise_or(sign))
