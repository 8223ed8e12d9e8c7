"""q4_k and q6_k, the formats of ggml with 256 numbers in a record and two levels of scales.

What a record means is ggml's; how scales are chosen is our own: a search for the least sum of
squared errors, the same for every number. ``code`` is always that of the nearest number that the
scales as stored can express, so what the search costs is quality, never the bound.

Everything is float32, in the order written here. A sum over a sub-block is taken from its first
number to its last, one after the other, so that the bits are the same on every device and in the
compiled loops; sub-blocks therefore lie in columns.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from quantrecipe.formats.records import RecordFormat, half_bytes, halves, reciprocal

LARGEST_HALF: Final = 65504.0
SMALLEST_HALF: Final = 2.0**-24

_STEPS: Final = tuple(14.0 + 0.25 * start for start in range(8))
"""Into how many steps the range of a sub-block is divided to begin with."""

_HEADROOM: Final = 32.0 * 115.0
_TRIED: Final = 12


def positive_half(numbers: Tensor) -> Tensor:
    """Numbers as float16 stores them, as float32; at least the smallest one, unless it is 0."""
    rounded = numbers.clamp(max=LARGEST_HALF).to(torch.float16).float().clamp_(min=SMALLEST_HALF)
    return rounded.masked_fill_(~(numbers > 0), 0.0)


def _column_sums(numbers: Tensor) -> Tensor:
    total = torch.zeros_like(numbers[0])
    for row in numbers:
        total += row
    return total


def _clamped_rint(numbers: Tensor, low: float, high: float) -> Tensor:
    return numbers.clamp_(low, high).round_()


def _nearest(weight: Tensor, step: Tensor, low: float, high: float) -> Tensor:
    """The codes of the multiples of ``step`` that are nearest; 0 where it is 0."""
    divisor = step.masked_fill(step == 0, torch.inf)
    return _clamped_rint(torch.div(weight, divisor), low, high).to(torch.int16)


class _Sums(NamedTuple):
    """Of the codes of each sub-block: the codes, their squares, their products with ``y``."""

    codes: Tensor
    squares: Tensor
    products: Tensor


class _Columns:
    """Sub-blocks of q4_k, one a column: ``y = x + depth``, which is not below 0.

    With a step ``s`` and an offset ``c``, ``y`` is approximated by ``s * code + c``, and ``x`` by
    ``s * code - minimum``, where ``minimum = depth - c`` cannot be stored below 0.
    """

    def __init__(self, x: Tensor) -> None:
        self.depth = x.neg().amax(0).clamp_(min=0)
        self.span = x.amax(0) + self.depth
        self.y = x + self.depth
        self.total = _column_sums(self.y)

    def sums(self, step: Tensor, offset: Tensor) -> _Sums:
        codes = _clamped_rint((self.y - offset) * reciprocal(step), 0, 15)
        return _Sums(_column_sums(codes), _column_sums(codes * codes), _column_sums(self.y * codes))

    def fit(self, sums: _Sums, step: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Step and offset of the least squares for these codes; as they were for equal codes."""
        a, b, p = sums
        det = b * 32 - a * a
        new_step = torch.div(p * 32 - a * self.total, det)
        new_offset = torch.div(b * self.total - a * p, det)
        beyond = new_offset > self.depth
        new_step = torch.where(beyond, torch.div(p - self.depth * a, b), new_step)
        new_offset = torch.where(beyond, self.depth, new_offset)
        known = det > 0
        return torch.where(known, new_step, step), torch.where(known, new_offset, offset)

    def error(self, sums: _Sums, step: Tensor, offset: Tensor) -> Tensor:
        """The sum of squared errors, less that of ``y``, which is the same for all."""
        a, b, p = sums
        of_codes = step * (step * b + (offset * a - p) * 2)
        return of_codes + offset * (offset * 32 - self.total * 2)

    def search(self) -> tuple[Tensor, Tensor]:
        """The step and the minimum of the least error that is found from several starts."""
        best_step, best_minimum = torch.zeros_like(self.span), torch.zeros_like(self.span)
        least = torch.full_like(self.span, torch.inf)
        for steps in _STEPS:
            step = torch.div(self.span, self.span.new_full((), steps))
            offset = torch.zeros_like(step)
            for _ in range(2):
                sums = self.sums(step, offset)
                step, offset = self.fit(sums, step, offset)
            error = self.error(sums, step, offset)
            better = error < least
            least = torch.where(better, error, least)
            best_step = torch.where(better, step, best_step)
            best_minimum = torch.where(better, self.depth - offset, best_minimum)
        return best_step, best_minimum

    def refine(
        self, step: Tensor, minimum: Tensor, d: Tensor, dmin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The 6-bit scale and minimum of each sub-block, near those that were found.

        Args:
            step: as found.
            minimum: as found.
            d: of the record that each column belongs to.
            dmin: likewise.
        """
        per_dmin = reciprocal(dmin)
        first_scale = _clamped_rint(step * reciprocal(d), 0, 63)
        first_minimum = _clamped_rint(minimum * per_dmin, 0, 63)
        best_scale, best_minimum = first_scale, first_minimum
        least = torch.full_like(step, torch.inf)
        for change in (-1, 0, 1):
            scale = (first_scale + change).clamp_(0, 63)
            step = d * scale
            sums = self.sums(step, self.depth - dmin * first_minimum)
            middle = self.depth - (self.total - step * sums.codes) * (1 / 32)
            fitted = _clamped_rint(middle * per_dmin, 0, 63)
            for minimum in (first_minimum, fitted):
                error = self.error(sums, step, self.depth - dmin * minimum)
                better = error < least
                least = torch.where(better, error, least)
                best_scale = torch.where(better, scale, best_scale)
                best_minimum = torch.where(better, minimum, best_minimum)
        return best_scale, best_minimum


class Q4K(RecordFormat):
    """q4_k: 8 sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum.

    ``w = (d * scale) * code - dmin * minimum``, codes 0 to 15. A record: ``d`` and ``dmin`` as
    float16, 12 bytes of scales and minima, 128 bytes of codes.

    The range of a sub-block, which includes 0, is divided into 14 to 15.75 steps; from each such
    start, codes and the line of the least squares through them are computed twice in turn, and the
    best line is kept. ``d`` and ``dmin`` follow from the largest. Then 6-bit scales one less and
    one more are tried, each with the minimum that suits its codes.
    """

    name = "q4_k"
    largest_code = 15.0
    numbers = 256
    record_bytes = 144
    reach = 63 * LARGEST_HALF

    def _scales(self, records: Tensor) -> Tensor:
        return halves(records, 0, count=2)

    def _encode(self, weight: Tensor) -> Tensor:
        x = weight.reshape(-1, 32).t().contiguous()
        columns = _Columns(x)
        step, minimum = columns.search()
        divisor = step.new_full((), 63.0)
        d = positive_half(torch.div(step.view(-1, 8).amax(1), divisor))
        dmin = positive_half(torch.div(minimum.view(-1, 8).amax(1), divisor))
        scale, minimum = columns.refine(
            step, minimum, d.repeat_interleave(8), dmin.repeat_interleave(8)
        )
        scale, minimum = scale.view(-1, 8), minimum.view(-1, 8)
        offset = (dmin[:, None] * minimum)[:, :, None]
        numbers = weight.view(-1, 8, 32) + offset
        codes = _nearest(numbers, (d[:, None] * scale)[:, :, None], 0, 15).to(torch.uint8)
        low, high = codes.view(-1, 4, 2, 32).unbind(2)
        packed = _pack_six_bits(scale.to(torch.uint8), minimum.to(torch.uint8))
        pairs = (low | (high << 4)).view(-1, 128)
        return torch.cat((half_bytes(d), half_bytes(dmin), packed, pairs), 1)

    def _decode(self, records: Tensor) -> Tensor:
        step, offset = self._lines(records)
        pairs = records[:, 16:].view(-1, 4, 1, 32)
        codes = torch.cat((pairs & 15, pairs >> 4), 2).view(-1, 8, 32)
        return codes.float().mul_(step).sub_(offset).view(-1, 256)

    def _bound(self, weight: Tensor, records: Tensor) -> Tensor:
        """The distance to the nearest of the 16 numbers that a sub-block can express.

        ``2^-18`` of a step and ``2^-22`` of the minimum allow for float32 arithmetic.
        """
        step, offset = self._lines(records)
        numbers = weight.view(-1, 8, 32)
        below = (numbers + offset).div_(step.double()).nan_to_num_(0, 15, 0).floor_().clamp_(0, 14)
        gaps = (_gap(numbers, step * (below + more).float() - offset) for more in (0, 1))
        slack = step.abs().double() * 2.0**-18 + offset.abs().double() * 2.0**-22
        return (torch.minimum(*gaps) + slack).view(weight.shape)

    def _lines(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Step and offset of each sub-block, float32 ``[n, 8, 1]``."""
        d, dmin = self._scales(records).float().unbind(1)
        first, second, third = records[:, 4:16].view(-1, 3, 4).unbind(1)
        scale = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), 1)
        minimum = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), 1)
        return (d[:, None] * scale.float())[:, :, None], (dmin[:, None] * minimum)[:, :, None]


class Q6K(RecordFormat):
    """q6_k: 16 sub-blocks of 16, each with a signed 8-bit scale.

    ``w = (d * scale) * (code - 32)``, codes 0 to 63. A record: the lower halves of codes (128
    bytes), their upper two bits (64), 16 scales, ``d`` as float16.

    The sign of a scale gives code 0 to the side of the number of the largest magnitude. ``d`` is
    such that this number gets code 0 with a scale of 115 in the sub-block where it is largest; then
    the 12 scales below and above are tried in each sub-block, with the errors of what would be
    stored.
    """

    name = "q6_k"
    largest_code = 32.0
    numbers = 256
    record_bytes = 210
    reach = _HEADROOM * LARGEST_HALF

    def _scales(self, records: Tensor) -> Tensor:
        return halves(records, 208)

    def _encode(self, weight: Tensor) -> Tensor:
        x = weight.reshape(-1, 16).t().contiguous()
        high, low = x.amax(0), x.amin(0)
        positive = high >= -low
        largest = torch.where(positive, high, -low)
        sign = torch.where(positive, -1.0, 1.0)
        d = positive_half(torch.div(largest.view(-1, 16).amax(1), x.new_full((), _HEADROOM)))
        scale = self._search(x, largest, sign, d.repeat_interleave(16)).view(-1, 16)
        step = (d[:, None] * scale)[:, :, None]
        codes = _nearest(weight.view(-1, 16, 16), step, -32, 31).add_(32).to(torch.uint8)
        # Each half of a record: 32 numbers, four times.
        first, second, third, fourth = codes.view(-1, 2, 4, 32).unbind(2)
        lower = torch.cat(((first & 15) | (third << 4), (second & 15) | (fourth << 4)), 2)
        upper = first >> 4 | second >> 4 << 2 | third >> 4 << 4 | fourth >> 4 << 6
        scales = scale.to(torch.int8).view(torch.uint8)
        return torch.cat((lower.view(-1, 128), upper.view(-1, 64), scales, half_bytes(d)), 1)

    def _search(self, x: Tensor, largest: Tensor, sign: Tensor, d: Tensor) -> Tensor:
        middle = _clamped_rint((largest * (1 / 32)) * reciprocal(d), 0, 127)
        best, least = torch.zeros_like(middle), torch.full_like(middle, torch.inf)
        for change in range(-_TRIED, _TRIED + 1):
            scale = (middle + change).clamp_(0, 127) * sign
            step = d * scale
            off = _clamped_rint(x * reciprocal(step), -32, 31).mul_(step).sub_(x)
            error = _column_sums(off.mul_(off))
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, scale, best)
        return best

    def _decode(self, records: Tensor) -> Tensor:
        lower, upper = records[:, :128].view(-1, 2, 64), records[:, 128:192].view(-1, 2, 32)
        low = torch.cat((lower & 15, lower >> 4), 2)
        high = torch.cat([upper >> shift & 3 for shift in (0, 2, 4, 6)], 2)
        codes = (low | (high << 4)).to(torch.int8).sub_(32).view(-1, 16, 16)
        return codes.float().mul_(self._steps(records)).view(-1, 256)

    def _bound(self, weight: Tensor, records: Tensor) -> Tensor:
        """The distance to the nearest of the 64 numbers that a sub-block can express.

        ``2^-17`` of a step allows for float32 arithmetic.
        """
        step, numbers = self._steps(records), weight.view(-1, 16, 16)
        below = numbers.div(step.double()).nan_to_num_(0, 31, -32).floor_().clamp_(-32, 30)
        gaps = (_gap(numbers, step * (below + more).float()) for more in (0, 1))
        return (torch.minimum(*gaps) + step.abs().double() * 2.0**-17).view(weight.shape)

    def _steps(self, records: Tensor) -> Tensor:
        """The step of each sub-block, float32 ``[n, 16, 1]``."""
        scale = records[:, 192:208].contiguous().view(torch.int8).float()
        return (self._scales(records).float() * scale)[:, :, None]


def _gap(numbers: Tensor, expressed: Tensor) -> Tensor:
    return (numbers - expressed).abs_()


def _pack_six_bits(scale: Tensor, minimum: Tensor) -> Tensor:
    """8 scales and 8 minima of 6 bits in 12 bytes.

    Four of each whole, with the upper two bits of the others above them; then the lower halves of
    the others in pairs.
    """
    low_scale, high_scale = scale[:, :4], scale[:, 4:]
    low_minimum, high_minimum = minimum[:, :4], minimum[:, 4:]
    return torch.cat(
        (
            low_scale | (high_scale >> 4 << 6),
            low_minimum | (high_minimum >> 4 << 6),
            (high_scale & 15) | (high_minimum << 4),
        ),
        1,
    )
