"""q8_0 and q4_0, the formats of ggml with 32 numbers in a record and one float16 scale ``d``.

The bytes are those that ggml writes. Codes are computed from the float32 ``d``, before it is
rounded to float16 to be stored: ``inverse = 1 / d`` in float32, and ``code = round(w * inverse)``.
A record of zeros, and one whose ``d`` is so small that float32 has no reciprocal of it, has the
codes of 0.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.records import RecordFormat, half_bytes, halves, reciprocal

_OVERFLOW: Final = 65519.99609375
"""The largest float32 that float16 does not round to infinity."""

# What rounding ``d`` to float16 changes: relative, and at least, in the subnormal range. A little
# more than half a place, since it is taken from the rounded number.
_RELATIVE: Final = 2.0**-11 * (1 + 2.0**-9)
_ABSOLUTE: Final = 2.0**-25
# Float32 arithmetic of codes up to 128: a few places of the quotient.
_SLACK: Final = 2.0**-14


class _OneScale(RecordFormat):
    numbers = 32

    def _scales(self, records: Tensor) -> Tensor:
        return halves(records, 0)


class Q8_0(_OneScale):  # noqa: N801 - its name
    """q8_0: ``d = amax / 127``, codes -127 to 127, halves rounded away from zero.

    A record: ``d`` as float16, then 32 int8 codes; ``w = code * d``.
    """

    name = "q8_0"
    largest_code = 127.0
    record_bytes = 34
    reach = _OVERFLOW * 127

    def _encode(self, weight: Tensor) -> Tensor:
        amax = weight.abs().amax(1)
        d = torch.div(amax, amax.new_full((), 127.0))
        ratio = weight * reciprocal(d)[:, None]
        magnitude = ratio.abs()
        whole = magnitude.floor()
        whole.add_((magnitude - whole) >= 0.5)
        codes = torch.copysign(whole, ratio).to(torch.int8)
        return torch.cat((half_bytes(d), codes.view(torch.uint8)), 1)

    def _decode(self, records: Tensor) -> Tensor:
        codes = records[:, 2:].contiguous().view(torch.int8)
        return codes.float().mul_(halves(records, 0).float())

    def _bound(self, weight: Tensor, records: Tensor) -> Tensor:
        """``d / 2 + (127 + 1/2) r + 2^-14 d``, with ``r = max(2^-11 d, 2^-25)``.

        Half a step, and what ``d`` was rounded by, times the largest code.
        """
        d = halves(records, 0).double().abs()
        rounded = (d * _RELATIVE).clamp_(min=_ABSOLUTE)
        return (d * (0.5 + _SLACK) + rounded * 127.5).expand_as(weight)


class Q4_0(_OneScale):  # noqa: N801 - its name
    """q4_0: ``d = top / -8`` for the number ``top`` of the largest magnitude, its sign included.

    ``code = min(trunc(w / d + 8.5), 15)``. A record: ``d`` as float16, then 16 bytes, in each the
    codes of the numbers ``i`` and, in the upper half, ``i + 16``; ``w = (code - 8) * d``.
    """

    name = "q4_0"
    largest_code = 8.0
    record_bytes = 18
    reach = _OVERFLOW * 8

    def _encode(self, weight: Tensor) -> Tensor:
        # Of several as large the first: argmax promises none of them.
        magnitude = weight.abs()
        largest = magnitude == magnitude.amax(1, keepdim=True)
        order = torch.arange(self.numbers, 0, -1, dtype=torch.int32, device=weight.device)
        first = (largest * order).argmax(1, keepdim=True)
        top = weight.gather(1, first)[:, 0]
        d = torch.div(top, top.new_full((), -8.0))
        codes = (weight * reciprocal(d)[:, None]).add_(8.5).trunc_().clamp_(max=15)
        low, high = codes.to(torch.uint8).view(-1, 2, 16).unbind(1)
        return torch.cat((half_bytes(d), low | (high << 4)), 1)

    def _decode(self, records: Tensor) -> Tensor:
        packed = records[:, 2:]
        codes = torch.cat((packed & 15, packed >> 4), 1).to(torch.int8).sub_(8)
        return codes.float().mul_(halves(records, 0).float())

    def _bound(self, weight: Tensor, records: Tensor) -> Tensor:
        """``min(max(a / 2, w sign(d) - 7 a), a) + 9 r + 2^-14 a``, with ``a = |d|``.

        There is no code 16: on the side of ``-d * 8`` up to a whole step is cut off.
        """
        d = halves(records, 0).double()
        step = d.abs()
        rounded = (step * _RELATIVE).clamp_(min=_ABSOLUTE)
        cut = weight * torch.sign(d) - 7 * step
        inner = torch.minimum(torch.maximum(cut, step * 0.5), step)
        return inner + rounded * 9 + step * _SLACK
