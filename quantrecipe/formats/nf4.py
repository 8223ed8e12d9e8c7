"""nf4: 4-bit codes for the quantiles of a normal distribution (QLoRA, arXiv 2305.14314).

The bits are those of bitsandbytes: the scale of a block is its absolute maximum, whatever it is,
and ``code`` is that of the level nearest to ``weight * (1 / scale)`` in float32, of the lower one
where two are equally near. A block of zeros has scale 0 and the code of level 0. Double-quantized
scales (``formats.double_quantization``) change no code: as in bitsandbytes codes are computed with
the maxima, and multiplied by what is left of them.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.grid import absmax, tiles
from quantrecipe.formats.nibbles import NibbleFormat, chunks, look_up
from quantrecipe.schema.schemes import ScaledWeight

LEVELS: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What each code stands for, times the scale; every number is a float32."""

_SMALLEST_DIVISOR: Final = 1e-38
"""The reciprocal of anything much smaller would be an infinity."""

BETWEEN: Final[list[float]] = (torch.tensor(LEVELS)[:-1] + torch.tensor(LEVELS)[1:]).div(2).tolist()
"""Halfway between levels, in float32: from there on downwards the lower one is taken."""

# Half of the widest step on either side of zero.
_NEGATIVE: Final = (LEVELS[1] - LEVELS[0]) / 2
_POSITIVE: Final = (LEVELS[15] - LEVELS[14]) / 2


class Nf4Format(NibbleFormat):
    """nf4 codes, one in a byte; a layout packs two into one."""

    name = "nf4"
    largest_code = 1.0
    _largest_level = 1.0

    def scales(self, amax: Tensor, spec: ScaledWeight) -> Tensor:
        return amax.clone()

    def levels(self, codes: Tensor, zero_point: Tensor | None, group: tuple[int, int]) -> Tensor:
        out = torch.empty(codes.shape, device=codes.device)
        self._unpack(codes, out, zero_point, group)
        return out

    def operand(self, scale: Tensor) -> Tensor:
        return scale.clamp(min=_SMALLEST_DIVISOR).reciprocal_()

    def _divide(self, weight: Tensor, operand: Tensor, out: Tensor) -> None:
        torch.mul(weight, operand, out=out)

    def _round(self, ratio: Tensor, zero_point: Tensor | None, group: tuple[int, int]) -> None:
        # There is nothing beyond the outermost levels, so nothing has to be clamped.
        for chunk in chunks(ratio):
            codes = torch.zeros_like(chunk, dtype=torch.uint8)
            above = torch.empty_like(chunk, dtype=torch.bool)
            for middle in BETWEEN:
                codes.add_(torch.gt(chunk, middle, out=above).view(torch.uint8))
            chunk.copy_(codes)

    def _unpack(
        self, codes: Tensor, out: Tensor, zero_point: Tensor | None, group: tuple[int, int]
    ) -> None:
        look_up(LEVELS, codes, out)

    def _bound(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """``max(h s, |w| - s) + |w| (1 - s / max(s, 1e-38)) + 2^-21 s + 2^-149``.

        ``h``: half the widest step on the weight's side of zero. The second term is there for
        scales whose reciprocal float32 has no place for; the last two are float32 rounding, of
        reciprocals that are subnormal and of products that are.
        """
        magnitude = weight.abs()
        half = torch.where(weight < 0, scale * _NEGATIVE, scale * _POSITIVE)
        lost = 1 - scale / scale.clamp(min=_SMALLEST_DIVISOR)
        slack = scale * 2.0**-21 + 2.0**-149
        return torch.maximum(half, magnitude - scale) + magnitude * lost + slack

    def bound(
        self,
        weight: Tensor,
        codes: Tensor,
        scale: Tensor,
        spec: ScaledWeight,
        *,
        zero_point: Tensor | None = None,
    ) -> Tensor:
        """That of the scales; double-quantized ones add their own error.

        Codes are those of the maxima ``a`` before they were compressed, which the weight still
        has: ``|w - level s| <= |w - level a| + |level| |a - s|``, and float32 rounding.
        """
        if not spec.has_two_levels:
            return super().bound(weight, codes, scale, spec, zero_point=zero_point)
        group = spec.group_shape(*weight.shape)
        amax = absmax(weight, group)
        result = super().bound(weight, codes, amax, spec)
        off = (amax.double() - scale.double()).abs() + 2.0**-23 * scale.double().abs()
        level = self.levels(codes, None, group).double().abs()
        for (view, target), each in tiles((level, result), off, group):
            target.add_(view.mul_(each))
        return result
