"""fp8 e4m3fn and e5m2: 8-bit floating-point codes, clamped to the largest finite value.

``scale = stored(amax / largest)``, ``code = cast(clamp(weight / scale, -largest, largest))`` in
float32 from the scale as stored; the cast rounds to nearest, ties to even. What a cast makes of a
value beyond the largest (a NaN, an infinity, the largest) differs between versions of torch, so
none ever sees one. Zeros keep their sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantrecipe.formats.scaled import ScaledFormat


class Float8Format(ScaledFormat):
    """One fp8 type.

    Args:
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        mantissa: its stored mantissa bits.
        first_non_finite: its smallest magnitude bits (sign cleared) that are no finite number.
    """

    def __init__(self, dtype: torch.dtype, mantissa: int, first_non_finite: int) -> None:
        info = torch.finfo(dtype)
        self.name = str(dtype).removeprefix("torch.")
        self.code_dtype = dtype
        self.largest_code = info.max
        self._mantissa = mantissa
        self._smallest_subnormal = info.smallest_normal * 2.0**-mantissa
        self._first_non_finite = first_non_finite

    def _round(self, ratio: Tensor, zero_point: Tensor | None, group: tuple[int, int]) -> None:
        ratio.clamp_(-self.largest_code, self.largest_code)

    def _unpack(
        self, codes: Tensor, out: Tensor, zero_point: Tensor | None, group: tuple[int, int]
    ) -> None:
        if self.code_dtype is torch.float8_e4m3fn:
            _unpack_e4m3fn(codes, out)
        else:
            out.copy_(codes)

    def _largest_bits(self, codes: Tensor) -> Tensor:
        # Read as signed bytes the largest code is positive, as unsigned ones negative: two fast
        # reductions find a code that is no number, of either sign.
        positive, negative = codes.view(torch.int8).amax(), codes.view(torch.uint8).amax()
        return torch.maximum(positive.int(), negative.int() - 0x80)

    def _bound(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """``max(min(max(|w| / (2^(m+1) + 1), t s / 2), h s), |w| - Q s)``, plus float32 rounding.

        ``m``: stored mantissa bits; the worst relative error is at the tie above a power of two.
        ``t``: the smallest subnormal. ``h``: half the step below the largest code ``Q``. Quotient
        and product each round by ``2^-24`` of at most ``2 |w|``, or of ``s`` where they underflow.
        """
        magnitude = weight.abs()
        # A tensor on the same device: torch may multiply by the reciprocal of a Python number.
        relative = magnitude / magnitude.new_full((), 2.0 ** (self._mantissa + 1) + 1)
        nearest = torch.maximum(relative, scale * (self._smallest_subnormal / 2))
        top = 2.0 ** (_exponent(self.largest_code) - self._mantissa - 1)
        inside = torch.minimum(nearest, scale * top)
        clipped = magnitude - self.largest_code * scale
        return torch.maximum(inside, clipped) + 2.0**-22 * magnitude + 2.0**-24 * scale


def _unpack_e4m3fn(codes: Tensor, out: Tensor) -> None:
    # torch's CPU conversion takes one value at a time. Exponent and mantissa moved to float32's
    # places give the value times 2^(7 - 127), subnormals too, and the power of two is exact.
    bits = out.view(torch.int32)
    bits.copy_(codes.view(torch.int8))
    bits.bitwise_left_shift_(20).bitwise_and_(-0x78100000)
    out.mul_(2.0**120)


def _exponent(value: float) -> int:
    return int(value).bit_length() - 1


E4M3FN = Float8Format(torch.float8_e4m3fn, mantissa=3, first_non_finite=0x7F)
E5M2 = Float8Format(torch.float8_e5m2, mantissa=2, first_non_finite=0x7C)
