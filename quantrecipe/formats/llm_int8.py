"""llm_int8: int8 codes as LLM.int8() stores them (arXiv 2208.07339), by row.

The scale of a row is its absolute maximum, ``code = clamp(rint(weight * (127 * (1 / scale))))`` and
``weight = (code * scale) * (1 / 127)``, step by step in float32: the bits of bitsandbytes, for
weights of any dtype, where its factor is a number. It is none for a row of zeros, which has codes 0
here, nor below ``2^-121``; here the factor of scales below ``2^-120`` is that of ``2^-120``. Scales
above ``2^128 / 127`` are refused: codes times them, the first step back, are beyond float32.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.int8 import Int8Format
from quantrecipe.formats.refusals import ScaleOutOfRange, first_index
from quantrecipe.schema.schemes import ScaledWeight

_LARGEST: Final = 127.0
_SMALLEST_DIVISOR: Final = 2.0**-120

STEP: Final = 1.0 / _LARGEST
"""What a code of 1 is of the scale; multiplied by in float32."""


class LlmInt8Format(Int8Format):
    """LLM.int8() codes; a source may hold -128, which is read as -128 and never written."""

    name = "llm_int8"
    # On the way; what comes out of it is no larger than the scale.
    _largest_level = 128.0

    def scales(self, amax: Tensor, spec: ScaledWeight) -> Tensor:
        index = first_index(torch.isinf(amax * amax.new_full((), _LARGEST)))
        if index is not None:
            raise ScaleOutOfRange(
                f"scale {float(amax[index])!r}, which codes up to 127 multiply first, is too large "
                "for float32",
                index,
            )
        return amax.clone()

    def levels(self, codes: Tensor, zero_point: Tensor | None, group: tuple[int, int]) -> Tensor:
        return codes.float().mul_(_step(codes))

    def operand(self, scale: Tensor) -> Tensor:
        return scale.clamp(min=_SMALLEST_DIVISOR).reciprocal_().mul_(_LARGEST)

    def _divide(self, weight: Tensor, operand: Tensor, out: Tensor) -> None:
        torch.mul(weight, operand, out=out)

    def _multiply(self, values: Tensor, scale: Tensor) -> None:
        values.mul_(scale).mul_(_step(values))

    def _bound(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """``max(s / 254, |w| - s) + |w| (1 - s / max(s, 2^-120)) + 2^-21 s + 2^-148``.

        Half a step, or what the clamp cuts off. The second term is there for scales whose factor
        float32 has no place for; the last two are float32 rounding: of a reciprocal, a
        factor, a quotient and two products, and of products that are subnormal.
        """
        magnitude = weight.abs()
        half = scale / (2 * _LARGEST)
        lost = 1 - scale / scale.clamp(min=_SMALLEST_DIVISOR)
        slack = scale * 2.0**-21 + 2.0**-148
        return torch.maximum(half, magnitude - scale) + magnitude * lost + slack


def _step(like: Tensor) -> Tensor:
    """1 / 127 in float32, where ``like`` is."""
    return torch.full((), STEP, device=like.device)
