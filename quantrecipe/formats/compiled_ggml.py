"""The loops of the record formats of ggml, compiled by numba.

Codes have the bits of the plain path in torch: every operation is float32, in the same order, and
none is contracted. K-quants work on many sub-blocks at a time, one in each lane, with the numbers
of a sub-block from first to last: sums then have one order on every machine, whatever the width of
its registers.
Every compiled function stays in this file: numba's disk cache notices a change of the file a
function is in, and of no other.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantrecipe.formats.compiling import cached, inlined

_Floats = NDArray[np.float32]
_Bytes = NDArray[np.uint8]

# Sub-blocks worked on at a time: their numbers stay in L1.
_LANES: Final = 128
_STARTS: Final = 8
_FIRST_STEPS: Final = np.float32(14.0)
_STEP_OF_STEPS: Final = np.float32(0.25)
_HEADROOM: Final = np.float32(32.0 * 115.0)
_TRIED: Final = 12
_SMALLEST_HALF: Final = np.float32(2.0**-24)
_LARGEST_HALF: Final = np.float32(65504.0)


@inlined
def _bits(number: Any) -> Any:
    return np.float32(number).view(np.int32)


@inlined
def _number(bits: Any) -> Any:
    return np.int32(bits).view(np.float32)


@inlined
def _half_bits(number: Any) -> Any:
    """The float16 nearest to a float32, ties to even, as its bits; the float32 is in its range."""
    bits = _bits(number)
    sign = np.int32(bits >> np.int32(16)) & np.int32(0x8000)
    magnitude = np.int32(bits & np.int32(0x7FFFFFFF))
    if magnitude < np.int32(0x38800000):
        # Subnormal: the last place of a float32 from 2^23 on counts ones.
        units = _number(magnitude) * np.float32(2.0**24) + np.float32(2.0**23)
        return sign | np.int32(_bits(units) - np.int32(0x4B000000))
    odd = np.int32(magnitude >> np.int32(13)) & np.int32(1)
    rounded = np.int32(magnitude + np.int32(0xFFF) + odd) >> np.int32(13)
    return sign | np.int32(rounded - np.int32(0x1C000))


@inlined
def _half_number(bits: Any) -> Any:
    """What the bits of a float16 stand for; exact, infinities and NaNs too."""
    sign = np.int32(np.int32(bits) & np.int32(0x8000)) << np.int32(16)
    magnitude = np.int32(np.int32(bits) & np.int32(0x7FFF)) << np.int32(13)
    if magnitude >= np.int32(0x0F800000):
        return _number(np.int32(magnitude + np.int32(0x70000000)) | sign)
    return _number(_bits(_number(magnitude) * np.float32(2.0**112)) | sign)


@inlined
def _put_half(number: Any, record: _Bytes, place: int) -> Any:
    """Store a float16 in a record; what it stands for."""
    bits = _half_bits(number)
    record[place] = np.uint8(bits & np.int32(0xFF))
    record[place + 1] = np.uint8(bits >> np.int32(8))
    return _half_number(bits)


@inlined
def _get_half(record: _Bytes, place: int) -> Any:
    return _half_number(np.int32(record[place]) | np.int32(record[place + 1]) << np.int32(8))


@inlined
def _positive_half(number: Any) -> Any:
    """``ggml_k.positive_half``."""
    if not number > np.float32(0):
        return np.float32(0)
    return max(_half_number(_half_bits(min(number, _LARGEST_HALF))), _SMALLEST_HALF)


@inlined
def _reciprocal(number: Any) -> Any:
    """0 where there is none that float32 holds."""
    inverse = np.float32(1) / number
    return inverse if abs(inverse) < np.float32(np.inf) else np.float32(0)


@inlined
def _clamped_rint(number: Any, low: Any, high: Any) -> Any:
    """Ties to even."""
    shifter = np.float32(1.5 * 2.0**23)
    return (min(max(number, low), high) + shifter) - shifter


@cached()
def encode_q8_0(weight: _Floats, records: _Bytes) -> None:
    """``Q8_0.encode`` of numbers that are a whole number of records."""
    shifter = np.float32(2.0**23)
    for block in range(len(weight) // 32):
        w = weight[32 * block : 32 * block + 32]
        record = records[34 * block : 34 * block + 34]
        largest = np.int32(0)
        for i in range(32):
            largest = max(largest, np.int32(_bits(w[i]) & np.int32(0x7FFFFFFF)))
        d = _number(largest) / np.float32(127)
        inverse = _reciprocal(d)
        _put_half(d, record, 0)
        codes = record[2:34]
        for i in range(32):
            ratio = w[i] * inverse
            sign = np.int32(_bits(ratio) >> np.int32(31))
            magnitude = abs(ratio)
            shifted = magnitude + shifter
            down = np.int32(magnitude - (shifted - shifter) >= np.float32(0.5))
            code = np.int32(_bits(shifted) - np.int32(0x4B000000)) + down
            signed = np.int32(code ^ sign) - sign
            # Clamped in vain: the processor packs bytes with saturation, and nothing else as fast.
            codes[i] = np.uint8(np.int32(min(max(signed, np.int32(-128)), np.int32(127))))


@cached()
def decode_q8_0(records: _Bytes, weight: _Floats) -> None:
    """``Q8_0.decode``."""
    for block in range(len(weight) // 32):
        w = weight[32 * block : 32 * block + 32]
        record = records[34 * block : 34 * block + 34]
        d = _get_half(record, 0)
        codes = record[2:34]
        for i in range(32):
            w[i] = np.float32(np.int8(codes[i])) * d


@cached()
def encode_q4_0(weight: _Floats, records: _Bytes) -> None:
    """``Q4_0.encode``."""
    codes = np.empty(32, np.uint8)
    for block in range(len(weight) // 32):
        w = weight[32 * block : 32 * block + 32]
        record = records[18 * block : 18 * block + 18]
        largest = np.int32(0)
        for i in range(32):
            largest = max(largest, np.int32(_bits(w[i]) & np.int32(0x7FFFFFFF)))
        # Of several as large, the first; the last that is found from behind.
        sign = np.int32(0)
        for i in range(32):
            bits = _bits(w[31 - i])
            if np.int32(bits & np.int32(0x7FFFFFFF)) == largest:
                sign = bits
        d = _number(np.int32(largest | np.int32(sign & np.int32(-0x80000000)))) / np.float32(-8)
        inverse = _reciprocal(d)
        _put_half(d, record, 0)
        for i in range(32):
            code = np.int32(w[i] * inverse + np.float32(8.5))
            codes[i] = np.uint8(np.int32(min(max(code, np.int32(0)), np.int32(15))))
        packed = record[2:18]
        for i in range(16):
            packed[i] = codes[i] | np.uint8(codes[16 + i] << np.uint8(4))


@cached()
def decode_q4_0(records: _Bytes, weight: _Floats) -> None:
    """``Q4_0.decode``."""
    for block in range(len(weight) // 32):
        w = weight[32 * block : 32 * block + 32]
        record = records[18 * block : 18 * block + 18]
        d = _get_half(record, 0)
        low, high, packed = w[:16], w[16:32], record[2:18]
        for i in range(16):
            low[i] = np.float32(np.int32(packed[i] & np.uint8(15)) - np.int32(8)) * d
            high[i] = np.float32(np.int32(packed[i] >> np.uint8(4)) - np.int32(8)) * d


@inlined
def _transposed(w: _Floats, lanes: int, size: int, out: _Floats) -> None:
    """``size`` numbers of each sub-block, one sub-block a column of ``out``."""
    for j in range(lanes):
        numbers = w[size * j : size * j + size]
        for i in range(size):
            out[i, j] = numbers[i]


@inlined
def _q4_k_sums(y: _Floats, offset: _Floats, inverse: _Floats, lanes: int, sums: _Floats) -> None:
    """Codes for ``(y - offset) * inverse``: sums of codes, of squares, of products with ``y``."""
    for j in range(lanes):
        sums[0, j] = np.float32(0)
        sums[1, j] = np.float32(0)
        sums[2, j] = np.float32(0)
    codes, squares, products = sums[0], sums[1], sums[2]
    for i in range(32):
        row = y[i]
        for j in range(lanes):
            code = _clamped_rint((row[j] - offset[j]) * inverse[j], np.float32(0), np.float32(15))
            codes[j] += code
            squares[j] += code * code
            products[j] += row[j] * code


@inlined
def _q4_k_fit(
    step: _Floats, offset: _Floats, depth: _Floats, total: _Floats, lanes: int, sums: _Floats
) -> None:
    """The step and offset of the least squares for the codes that ``sums`` are of."""
    count, zero = np.float32(32), np.float32(0)
    codes, squares, products = sums[0], sums[1], sums[2]
    for j in range(lanes):
        a, b, p = codes[j], squares[j], products[j]
        det = count * b - a * a
        new_step = (count * p - a * total[j]) / det
        new_offset = (b * total[j] - a * p) / det
        beyond = new_offset > depth[j]
        new_step = (p - depth[j] * a) / b if beyond else new_step
        new_offset = depth[j] if beyond else new_offset
        step[j] = new_step if det > zero else step[j]
        offset[j] = new_offset if det > zero else offset[j]


@inlined
def _q4_k_error(step: Any, offset: Any, a: Any, b: Any, p: Any, total: Any) -> Any:
    """The sum of squared errors, less that of ``y``."""
    two, count = np.float32(2), np.float32(32)
    return step * (step * b + two * (offset * a - p)) + offset * (count * offset - two * total)


@inlined
def _q4_k_start(x: _Floats, lanes: int, y: _Floats, lane: _Floats) -> None:
    """``y``, and in ``lane``: depth, total, span."""
    depth, total, span = lane[0], lane[1], lane[2]
    for j in range(lanes):
        depth[j] = np.float32(0)
        span[j] = x[0, j]
        total[j] = np.float32(0)
    for i in range(32):
        row = x[i]
        for j in range(lanes):
            depth[j] = max(depth[j], -row[j])
            span[j] = max(span[j], row[j])
    for j in range(lanes):
        span[j] += depth[j]
    for i in range(32):
        row, shifted = x[i], y[i]
        for j in range(lanes):
            shifted[j] = row[j] + depth[j]
            total[j] += shifted[j]


@inlined
def _q4_k_search(y: _Floats, lanes: int, lane: _Floats, sums: _Floats) -> None:
    """The best of several steps and minima of each sub-block, into ``lane``'s rows 3 and 4."""
    depth, total, span, best_step, best_minimum = lane[0], lane[1], lane[2], lane[3], lane[4]
    step, offset, inverse, least = lane[5], lane[6], lane[7], lane[8]
    codes, squares, products = sums[0], sums[1], sums[2]
    for j in range(lanes):
        least[j] = np.float32(np.inf)
        best_step[j] = np.float32(0)
        best_minimum[j] = np.float32(0)
    for start in range(_STARTS):
        steps = _FIRST_STEPS + _STEP_OF_STEPS * np.float32(start)
        for j in range(lanes):
            step[j] = span[j] / steps
            offset[j] = np.float32(0)
        for _ in range(2):
            for j in range(lanes):
                inverse[j] = _reciprocal(step[j])
            _q4_k_sums(y, offset, inverse, lanes, sums)
            _q4_k_fit(step, offset, depth, total, lanes, sums)
        for j in range(lanes):
            error = _q4_k_error(step[j], offset[j], codes[j], squares[j], products[j], total[j])
            better = error < least[j]
            least[j] = error if better else least[j]
            best_step[j] = step[j] if better else best_step[j]
            best_minimum[j] = depth[j] - offset[j] if better else best_minimum[j]


@inlined
def _q4_k_refine(
    y: _Floats, lanes: int, lane: _Floats, sums: _Floats, d: _Floats, dmin: _Floats
) -> None:
    """Rows 3 and 4 of ``lane`` become the 6-bit scale and minimum of each sub-block."""
    depth, total, scale, minimum = lane[0], lane[1], lane[3], lane[4]
    step, offset, inverse, least = lane[5], lane[6], lane[7], lane[8]
    first_scale, first_minimum = lane[9], lane[10]
    codes, squares, products = sums[0], sums[1], sums[2]
    zero, top, part = np.float32(0), np.float32(63), np.float32(1 / 32)
    for j in range(lanes):
        least[j] = np.float32(np.inf)
        first_scale[j] = _clamped_rint(scale[j] * _reciprocal(d[j >> 3]), zero, top)
        first_minimum[j] = _clamped_rint(minimum[j] * _reciprocal(dmin[j >> 3]), zero, top)
    for change in range(-1, 2):
        for j in range(lanes):
            k = min(max(first_scale[j] + np.float32(change), zero), top)
            step[j] = d[j >> 3] * k
            inverse[j] = _reciprocal(step[j])
            offset[j] = depth[j] - dmin[j >> 3] * first_minimum[j]
        _q4_k_sums(y, offset, inverse, lanes, sums)
        for j in range(lanes):
            a, b, p, s = codes[j], squares[j], products[j], step[j]
            k = min(max(first_scale[j] + np.float32(change), zero), top)
            error = _q4_k_error(s, offset[j], a, b, p, total[j])
            better = error < least[j]
            least[j] = error if better else least[j]
            scale[j] = k if better else scale[j]
            minimum[j] = first_minimum[j] if better else minimum[j]
            wanted = depth[j] - (total[j] - s * a) * part
            m = _clamped_rint(wanted * _reciprocal(dmin[j >> 3]), zero, top)
            error = _q4_k_error(s, depth[j] - dmin[j >> 3] * m, a, b, p, total[j])
            better = error < least[j]
            least[j] = error if better else least[j]
            scale[j] = k if better else scale[j]
            minimum[j] = m if better else minimum[j]


@inlined
def _q4_k_pack(w: _Floats, scale: _Floats, minimum: _Floats, record: _Bytes, codes: _Bytes) -> None:
    """A record: the codes nearest to the numbers for the scales and minima as stored."""
    d, dmin = _get_half(record, 0), _get_half(record, 2)
    packed = record[4:16]
    for j in range(4):
        low, high = np.int32(scale[j]), np.int32(scale[j + 4])
        low_minimum, high_minimum = np.int32(minimum[j]), np.int32(minimum[j + 4])
        packed[j] = np.uint8(low | (high >> 4) << 6)
        packed[j + 4] = np.uint8(low_minimum | (high_minimum >> 4) << 6)
        packed[j + 8] = np.uint8((high & 15) | (high_minimum & 15) << 4)
    for j in range(8):
        numbers, step, offset = w[32 * j : 32 * j + 32], d * scale[j], dmin * minimum[j]
        found = codes[32 * (j & 1) : 32 * (j & 1) + 32]
        divisor = step if step > np.float32(0) else np.float32(np.inf)
        for i in range(32):
            code = _clamped_rint((numbers[i] + offset) / divisor, np.float32(0), np.float32(15))
            found[i] = np.uint8(np.int32(code))
        if j & 1:
            pairs = record[16 * j : 16 * j + 32]
            for i in range(32):
                pairs[i] = codes[i] | np.uint8(codes[32 + i] << np.uint8(4))


@cached()
def encode_q4_k(weight: _Floats, records: _Bytes) -> None:
    """``Q4K.encode``."""
    x, y = np.empty((32, _LANES), np.float32), np.empty((32, _LANES), np.float32)
    lane, sums = np.empty((11, _LANES), np.float32), np.empty((3, _LANES), np.float32)
    d, dmin = np.empty(_LANES // 8, np.float32), np.empty(_LANES // 8, np.float32)
    codes, every = np.empty(64, np.uint8), len(weight) // 256
    for first in range(0, every, _LANES // 8):
        count = min(_LANES // 8, every - first)
        lanes = 8 * count
        w = weight[256 * first : 256 * (first + count)]
        _transposed(w, lanes, 32, x)
        _q4_k_start(x, lanes, y, lane)
        _q4_k_search(y, lanes, lane, sums)
        for n in range(count):
            step, minimum = np.float32(0), np.float32(0)
            for j in range(8 * n, 8 * n + 8):
                step, minimum = max(step, lane[3, j]), max(minimum, lane[4, j])
            d[n] = _positive_half(step / np.float32(63))
            dmin[n] = _positive_half(minimum / np.float32(63))
        _q4_k_refine(y, lanes, lane, sums, d, dmin)
        for n in range(count):
            record = records[144 * (first + n) : 144 * (first + n + 1)]
            _put_half(d[n], record, 0)
            _put_half(dmin[n], record, 2)
            _q4_k_pack(
                w[256 * n : 256 * n + 256],
                lane[3, 8 * n : 8 * n + 8],
                lane[4, 8 * n : 8 * n + 8],
                record,
                codes,
            )


@cached()
def decode_q4_k(records: _Bytes, weight: _Floats) -> None:
    """``Q4K.decode``."""
    for block in range(len(weight) // 256):
        record = records[144 * block : 144 * block + 144]
        d, dmin, packed = _get_half(record, 0), _get_half(record, 2), record[4:16]
        for j in range(8):
            if j < 4:
                scale, minimum = packed[j] & np.uint8(63), packed[j + 4] & np.uint8(63)
            else:
                scale = (packed[j + 4] & np.uint8(15)) | (packed[j - 4] >> np.uint8(6)) << np.uint8(
                    4
                )
                minimum = (packed[j + 4] >> np.uint8(4)) | (packed[j] >> np.uint8(6)) << np.uint8(4)
            step, offset = d * np.float32(scale), dmin * np.float32(minimum)
            w = weight[256 * block + 32 * j : 256 * block + 32 * j + 32]
            pairs, shift = record[16 + 32 * (j >> 1) : 48 + 32 * (j >> 1)], np.uint8(4 * (j & 1))
            for i in range(32):
                w[i] = step * np.float32((pairs[i] >> shift) & np.uint8(15)) - offset


@inlined
def _q6_k_errors(x: _Floats, step: _Floats, inverse: _Floats, lanes: int, error: _Floats) -> None:
    for j in range(lanes):
        error[j] = np.float32(0)
    for i in range(16):
        row = x[i]
        for j in range(lanes):
            code = _clamped_rint(row[j] * inverse[j], np.float32(-32), np.float32(31))
            off = step[j] * code - row[j]
            error[j] += off * off


@inlined
def _q6_k_start(x: _Floats, lanes: int, lane: _Floats) -> None:
    """In ``lane``: the largest magnitude of each sub-block, and the sign of its scale."""
    largest, sign, low = lane[0], lane[1], lane[2]
    for j in range(lanes):
        largest[j] = x[0, j]
        low[j] = x[0, j]
    for i in range(1, 16):
        row = x[i]
        for j in range(lanes):
            largest[j] = max(largest[j], row[j])
            low[j] = min(low[j], row[j])
    for j in range(lanes):
        positive = largest[j] >= -low[j]
        sign[j] = np.float32(-1) if positive else np.float32(1)
        largest[j] = largest[j] if positive else -low[j]


@inlined
def _q6_k_search(x: _Floats, lanes: int, lane: _Floats, d: _Floats) -> None:
    """Row 3 of ``lane`` becomes the signed 8-bit scale of each sub-block."""
    largest, sign, scale, middle = lane[0], lane[1], lane[3], lane[4]
    step, inverse, error, least = lane[5], lane[6], lane[7], lane[8]
    zero, top = np.float32(0), np.float32(127)
    for j in range(lanes):
        least[j] = np.float32(np.inf)
        scale[j] = zero
        wanted = (largest[j] * np.float32(1 / 32)) * _reciprocal(d[j >> 4])
        middle[j] = _clamped_rint(wanted, zero, top)
    for change in range(-_TRIED, _TRIED + 1):
        for j in range(lanes):
            k = min(max(middle[j] + np.float32(change), zero), top) * sign[j]
            step[j] = d[j >> 4] * k
            inverse[j] = _reciprocal(step[j])
        _q6_k_errors(x, step, inverse, lanes, error)
        for j in range(lanes):
            k = min(max(middle[j] + np.float32(change), zero), top) * sign[j]
            better = error[j] < least[j]
            least[j] = error[j] if better else least[j]
            scale[j] = k if better else scale[j]


@inlined
def _q6_k_pack(w: _Floats, scale: _Floats, d: Any, record: _Bytes, codes: _Bytes) -> None:
    for j in range(16):
        record[192 + j] = np.uint8(np.int32(scale[j]) & np.int32(255))
        numbers, step = w[16 * j : 16 * j + 16], d * scale[j]
        found = codes[16 * j : 16 * j + 16]
        divisor = step if step != np.float32(0) else np.float32(np.inf)
        for i in range(16):
            code = _clamped_rint(numbers[i] / divisor, np.float32(-32), np.float32(31))
            found[i] = np.uint8(np.int32(code) + np.int32(32))
    for half in range(2):
        first, second = (
            codes[128 * half : 128 * half + 32],
            codes[128 * half + 32 : 128 * half + 64],
        )
        third = codes[128 * half + 64 : 128 * half + 96]
        fourth = codes[128 * half + 96 : 128 * half + 128]
        low, high = record[64 * half : 64 * half + 32], record[64 * half + 32 : 64 * half + 64]
        upper, four = record[128 + 32 * half : 160 + 32 * half], np.uint8(4)
        for i in range(32):
            low[i] = (first[i] & np.uint8(15)) | np.uint8(third[i] << four)
            high[i] = (second[i] & np.uint8(15)) | np.uint8(fourth[i] << four)
            upper[i] = np.uint8(
                (first[i] >> four)
                | (second[i] >> four) << np.uint8(2)
                | (third[i] >> four) << four
                | (fourth[i] >> four) << np.uint8(6)
            )


@cached()
def encode_q6_k(weight: _Floats, records: _Bytes) -> None:
    """``Q6K.encode``."""
    x, lane = np.empty((16, _LANES), np.float32), np.empty((9, _LANES), np.float32)
    d, codes = np.empty(_LANES // 16, np.float32), np.empty(256, np.uint8)
    every = len(weight) // 256
    for first in range(0, every, _LANES // 16):
        count = min(_LANES // 16, every - first)
        lanes = 16 * count
        w = weight[256 * first : 256 * (first + count)]
        _transposed(w, lanes, 16, x)
        _q6_k_start(x, lanes, lane)
        for n in range(count):
            largest = np.float32(0)
            for j in range(16 * n, 16 * n + 16):
                largest = max(largest, lane[0, j])
            d[n] = _positive_half(largest / _HEADROOM)
        _q6_k_search(x, lanes, lane, d)
        for n in range(count):
            record = records[210 * (first + n) : 210 * (first + n + 1)]
            _put_half(d[n], record, 208)
            numbers = w[256 * n : 256 * n + 256]
            _q6_k_pack(numbers, lane[3, 16 * n : 16 * n + 16], d[n], record, codes)


@cached()
def decode_q6_k(records: _Bytes, weight: _Floats) -> None:
    """``Q6K.decode``."""
    codes = np.empty(256, np.int8)
    for block in range(len(weight) // 256):
        record = records[210 * block : 210 * block + 210]
        d = _get_half(record, 208)
        for half in range(2):
            low, high = record[64 * half : 64 * half + 32], record[64 * half + 32 : 64 * half + 64]
            upper, found = record[128 + 32 * half : 160 + 32 * half], codes[128 * half :]
            for i in range(32):
                found[i] = np.int8((low[i] & 15) | (upper[i] & 3) << 4) - np.int8(32)
                found[32 + i] = np.int8((high[i] & 15) | (upper[i] >> 2 & 3) << 4) - np.int8(32)
                found[64 + i] = np.int8(low[i] >> 4 | (upper[i] >> 4 & 3) << 4) - np.int8(32)
                found[96 + i] = np.int8(high[i] >> 4 | upper[i] >> 6 << 4) - np.int8(32)
        for j in range(16):
            step = d * np.float32(np.int8(record[192 + j]))
            w, some = weight[256 * block + 16 * j :], codes[16 * j : 16 * j + 16]
            for i in range(16):
                w[i] = step * np.float32(some[i])
