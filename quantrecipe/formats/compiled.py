"""The loops of ``transform`` and ``proof``, compiled by numba: each row is worked on in cache.

Everything is float32 as written: no contraction to fused multiply-add, no reciprocal, so codes and
scales have the plain path's bits. Only squares may be contracted (``_summing``), which are exact in
float64, so sums have its bits too.
Every compiled function stays in this file: numba's disk cache notices a change of the file a
function is in, and of no other.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

from quantrecipe.formats.compiling import Compile, cached, inlined

BFLOAT16: Final = 0
FLOAT16: Final = 1
FLOAT32: Final = 2
INT8: Final = 3
FLOAT8_E4M3FN: Final = 4
FLOAT8_E5M2: Final = 5
KINDS: Final = {
    "bfloat16": BFLOAT16,
    "float16": FLOAT16,
    "float32": FLOAT32,
    "int8": INT8,
    "float8_e4m3fn": FLOAT8_E4M3FN,
    "float8_e5m2": FLOAT8_E5M2,
}
"""What the kernels call each format."""

MEASURE: Final = 0
ENCODE: Final = 1

REFUSED: Final = -1.0
"""Returned for a block with a number that the plain path refuses; it knows which and why."""

_Floats = NDArray[np.float32]
_Doubles = NDArray[np.float64]
_Bytes = NDArray[np.uint8]

_INFINITY: Final = np.int32(0x7F800000)
# ``error.LANES``.
_LANES: Final = 1024
# Columns worked on at a time: w, then errors in its place, codes and the lanes stay in L1, and a
# lane is read and written once for four columns.
_CHUNK: Final = 4 * _LANES
# Columns after which a candidate of a search may be given up.
_SEARCHED: Final = 512
_LARGEST: Final = (np.float32(127.0), np.float32(448.0), np.float32(57344.0))


_summing: Final[Compile] = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})


@inlined
def _bits(number: Any) -> Any:
    return np.float32(number).view(np.int32)


@inlined
def _magnitude(number: Any) -> Any:
    """The bits of a float32 without its sign: in the order of magnitudes, then infinity, NaNs."""
    return np.int32(np.float32(number).view(np.int32) & np.int32(0x7FFFFFFF))


@inlined
def _number(bits: Any) -> Any:
    return np.int32(bits).view(np.float32)


@inlined
def _decode_16(bfloat16: bool, stored: NDArray[np.uint16], w: _Floats) -> Any:
    """bfloat16 is float32's upper half; float16 moved to float32's places is 2^-112 of itself.

    Returns, as all decoders do, whether all are numbers, and the bits of the largest magnitude:
    found along the way where that is no slower than ``_absmax``.
    """
    largest = np.int32(0)
    if bfloat16:
        for j in range(len(w)):
            w[j] = _number(np.int32(stored[j]) << np.int32(16))
            largest = max(largest, _magnitude(w[j]))
        return True, largest
    up = np.float32(2.0**112)
    for j in range(len(w)):
        magnitude = np.int32(stored[j] & np.uint16(0x7FFF))
        largest = max(largest, magnitude)
        sign = np.int32(stored[j] & np.uint16(0x8000)) << np.int32(16)
        w[j] = _number((magnitude << np.int32(13)) | sign) * up
    return largest < np.int32(0x7C00), _bits(_number(largest << np.int32(13)) * up)


@inlined
def _decode_32(stored: NDArray[np.uint32], w: _Floats) -> Any:
    largest = np.int32(0)
    for j in range(len(w)):
        w[j] = _number(stored[j])
        largest = max(largest, _magnitude(w[j]))
    return True, largest


@inlined
def _decode_int8(stored: _Bytes, scale: Any, w: _Floats) -> Any:
    for j in range(len(w)):
        w[j] = np.float32(np.int8(stored[j])) * scale
    return True, _absmax(w)


@inlined
def _decode_e4m3fn(stored: _Bytes, scale: Any, w: _Floats) -> Any:
    """Exponent and mantissa in float32's places, times what the biases differ by: exact."""
    up = np.float32(2.0**120)
    for j in range(len(w)):
        bits = np.int32((np.int32(np.int8(stored[j])) << np.int32(20)) & np.int32(-0x78100000))
        w[j] = (_number(bits) * up) * scale
    return _all_below(stored, np.uint8(0x7F)), _absmax(w)


@inlined
def _decode_e5m2(stored: _Bytes, scale: Any, w: _Floats) -> Any:
    up = np.float32(2.0**112)
    for j in range(len(w)):
        bits = np.int32((np.int32(np.int8(stored[j])) << np.int32(21)) & np.int32(-0x70200000))
        w[j] = (_number(bits) * up) * scale
    return _all_below(stored, np.uint8(0x7C)), _absmax(w)


@inlined
def _all_below(stored: _Bytes, limit: Any) -> bool:
    """Whether every fp8 code is a number: the magnitude bits of those that are none come last."""
    largest = np.uint8(0)
    for j in range(len(stored)):
        magnitude = np.uint8(stored[j] & np.uint8(0x7F))
        if magnitude > largest:
            largest = magnitude
    return bool(largest < limit)


@inlined
def _decode_group(kind: int, stored: _Bytes, scale: Any, w: _Floats) -> Any:
    if kind == INT8:
        return _decode_int8(stored, scale, w)
    if kind == FLOAT8_E4M3FN:
        return _decode_e4m3fn(stored, scale, w)
    return _decode_e5m2(stored, scale, w)


@inlined
def _decode_chunk(
    kind: int, stored: _Bytes, scales: _Floats, width: int, start: int, stop: int, w: _Floats
) -> Any:
    """Columns ``start`` to ``stop`` of a stored row in ``w``."""
    if kind in (BFLOAT16, FLOAT16):
        return _decode_16(kind == BFLOAT16, stored[2 * start : 2 * stop].view(np.uint16), w)
    if kind == FLOAT32:
        return _decode_32(stored[4 * start : 4 * stop].view(np.uint32), w)
    fine, largest, left = True, np.int32(0), start
    while left < stop:
        group = left // width
        right = min((group + 1) * width, stop)
        numbers = w[left - start : right - start]
        found = _decode_group(kind, stored[left:right], scales[group], numbers)
        fine, largest = fine and found[0], max(largest, found[1])
        left = right
    return fine, largest


@inlined
def _decode_row(
    kind: int,
    stored: _Bytes,
    scales: _Floats,
    width: int,
    factors: _Floats,
    rotation: int,
    w: _Floats,
    maxima: NDArray[np.int32],
    width_out: int,
) -> bool:
    """A stored row as float32 in ``w``; raises its groups' maxima; false if one is no number."""
    fine, largest, smoothed = True, np.int32(0), len(factors) == len(w)
    changed = smoothed or rotation > 0
    for start in range(0, len(w), _CHUNK):
        stop = min(start + _CHUNK, len(w))
        numbers, group = w[start:stop], start // width_out
        found = _decode_chunk(kind, stored, scales, width, start, stop, numbers)
        fine, bits = fine and found[0], found[1]
        if smoothed:
            _multiply(numbers, factors[start:stop])
        if rotation:
            fine = fine and _absmax(numbers) < _INFINITY
            _rotate(numbers, rotation)
        if changed or (stop - 1) // width_out != group:
            bits = _raise_maxima(numbers, start, maxima, width_out)
        else:
            maxima[group] = max(maxima[group], bits)
        largest = max(largest, bits)
    return bool(fine and largest < _INFINITY)


@inlined
def _multiply(w: _Floats, factors: _Floats) -> None:
    for j in range(len(w)):
        w[j] *= factors[j]


@inlined
def _rotate(w: _Floats, size: int) -> None:
    """``rotation.rotate_``: a chunk is whole blocks, and stays in L1 from step to step."""
    stride, shrink = 1, np.float32(1)
    while stride < size:
        shrink *= np.float32(0.5)
        if stride == 1:
            _neighbours(w)
        else:
            for start in range(0, len(w), 4 * stride):
                _butterflies(w[start : start + 4 * stride], stride)
        stride *= 4
    for j in range(len(w)):
        w[j] *= shrink


@inlined
def _neighbours(w: _Floats) -> None:
    for j in range(len(w) // 4):
        a, b, c, d = w[4 * j], w[4 * j + 1], w[4 * j + 2], w[4 * j + 3]
        w[4 * j], w[4 * j + 1] = (a + b) + (c - d), (a + b) - (c - d)
        w[4 * j + 2], w[4 * j + 3] = (c + d) + (a - b), (c + d) - (a - b)


@inlined
def _butterflies(block: _Floats, stride: int) -> None:
    first, second = block[:stride], block[stride : 2 * stride]
    third, fourth = block[2 * stride : 3 * stride], block[3 * stride : 4 * stride]
    for j in range(stride):
        a, b, c, d = first[j], second[j], third[j], fourth[j]
        first[j], second[j] = (a + b) + (c - d), (a + b) - (c - d)
        third[j], fourth[j] = (c + d) + (a - b), (c + d) - (a - b)


@inlined
def _absmax(w: _Floats) -> np.int32:
    """The bits of the largest magnitude; infinities, then NaNs, are larger than any number."""
    largest = np.int32(0)
    for j in range(len(w)):
        bits = _magnitude(w[j])
        if bits > largest:
            largest = bits
    return largest


@inlined
def _raise_maxima(w: _Floats, start: int, maxima: NDArray[np.int32], width: int) -> np.int32:
    """Raise the maxima of the groups that columns from ``start`` on are in; return the largest."""
    largest, left, stop = np.int32(0), start, start + len(w)
    while left < stop:
        group = left // width
        right = min((group + 1) * width, stop)
        bits = _absmax(w[left - start : right - start])
        maxima[group] = max(maxima[group], bits)
        largest = max(largest, bits)
        left = right
    return largest


@inlined
def _stored_scale(amax: Any, largest_code: Any, dtype: int) -> Any:
    """``ScaledFormat.scales`` for one group, as float32; infinite if ``dtype`` cannot hold it."""
    if amax == np.float32(0):
        return np.float32(1)
    floor = np.float32(2.0**-14) if dtype == FLOAT16 else np.float32(2.0**-126)
    scale = max(amax / largest_code, floor)
    if dtype == FLOAT32:
        return scale
    shift = 16 if dtype == BFLOAT16 else 13
    bits = np.int64(_bits(scale))
    rounded = _number((bits + (1 << (shift - 1)) - 1 + ((bits >> shift) & 1)) >> shift << shift)
    if dtype == FLOAT16 and rounded > np.float32(65504):
        return np.float32(np.inf)
    return rounded


@inlined
def _encode_int8(w: _Floats, scale: Any, codes: _Bytes) -> np.int32:
    """Codes, and their errors in place of ``w``; returns the bits of the largest error."""
    # Added to this, a number in [-127, 127] is rounded to an integer, ties to even, which is what
    # its bits go up by.
    shifter = np.float32(1.5 * 2.0**23)
    top, zero = np.float32(127), _bits(np.float32(1.5 * 2.0**23))
    largest = np.int32(0)
    for j in range(len(w)):
        ratio = w[j] / scale
        shifted = min(max(ratio, -top), top) + shifter
        # Clamped in vain: the processor packs bytes with saturation, and with nothing else as fast.
        code = np.int32(_bits(shifted) - zero)
        codes[j] = np.uint8(np.int32(min(max(code, np.int32(-128)), np.int32(127))))
        w[j] = (shifted - shifter) * scale - w[j]
        largest = max(largest, _magnitude(w[j]))
    return largest


@inlined
def _encode_float8(
    w: _Floats, scale: Any, codes: _Bytes, mantissa: int, bias: int, top: Any
) -> np.int32:
    """The same, to nearest, ties to even.

    Added to ``step``, a power of two, a magnitude is rounded to the step of the codes around it:
    the last place of the sum counts those steps, and what is left without ``step`` is their value.
    """
    shift = np.int32(23 - mantissa)
    up = np.int32((23 - mantissa) << 23)
    normal = np.int32((128 - bias) << 23)
    largest = np.int32(0)
    for j in range(len(w)):
        bits = _bits(w[j] / scale)
        sign = np.int32(bits & np.int32(-0x80000000))
        magnitude = min(np.int32(bits & np.int32(0x7FFFFFFF)), top)
        power = max(np.int32(magnitude & np.int32(0x7F800000)), normal)
        step = np.int32(power + up)
        shifted = _number(magnitude) + _number(step)
        below = np.int32(np.int32(power - normal) >> shift)
        code = np.int32(np.int32(_bits(shifted) - step) + below)
        code = np.int32(code | np.int32((sign >> np.int32(24)) & np.int32(0x80)))
        # In vain, as above.
        codes[j] = np.uint8(np.int32(min(max(code, np.int32(0)), np.int32(255))))
        w[j] = _number(_bits(shifted - _number(step)) | sign) * scale - w[j]
        largest = max(largest, _magnitude(w[j]))
    return largest


@inlined
def _encode_group(kind: int, w: _Floats, scale: Any, codes: _Bytes) -> Any:
    if kind == INT8:
        return _encode_int8(w, scale, codes)
    if kind == FLOAT8_E4M3FN:
        return _encode_float8(w, scale, codes, 3, 7, np.int32(0x43E00000))
    return _encode_float8(w, scale, codes, 2, 15, np.int32(0x47600000))


@_summing
def _add_squares(numbers: _Floats, lanes: _Doubles) -> None:
    for j in range(len(numbers)):
        lanes[j] += np.float64(numbers[j]) * np.float64(numbers[j])


@_summing
def _add_four_squares(numbers: _Floats, lanes: _Doubles) -> None:
    first, second = numbers[:_LANES], numbers[_LANES : 2 * _LANES]
    third, fourth = numbers[2 * _LANES : 3 * _LANES], numbers[3 * _LANES : 4 * _LANES]
    for j in range(_LANES):
        total = lanes[j]
        total += np.float64(first[j]) * np.float64(first[j])
        total += np.float64(second[j]) * np.float64(second[j])
        total += np.float64(third[j]) * np.float64(third[j])
        total += np.float64(fourth[j]) * np.float64(fourth[j])
        lanes[j] = total


@inlined
def _accumulate(numbers: _Floats, lanes: _Doubles) -> None:
    """The squares of a chunk, each in its column's lane: ``error.sums_of_squares``."""
    if len(numbers) == _CHUNK:
        _add_four_squares(numbers, lanes)
        return
    for start in range(0, len(numbers), _LANES):
        _add_squares(numbers[start : start + _LANES], lanes)


@inlined
def _folded(lanes: _Doubles, columns: int) -> Any:
    """The sum of the lanes, halved again and again; three halvings in one go. Leaves them zero.

    Those beyond ``columns`` are zero already.
    """
    eighth = _LANES // 8
    for j in range(eighth if columns > eighth else 0):
        even = (lanes[j] + lanes[4 * eighth + j]) + (lanes[2 * eighth + j] + lanes[6 * eighth + j])
        odd = (lanes[eighth + j] + lanes[5 * eighth + j]) + (
            lanes[3 * eighth + j] + lanes[7 * eighth + j]
        )
        lanes[j] = even + odd
    half = eighth // 2
    while half:
        for j in range(half):
            lanes[j] += lanes[half + j]
        half //= 2
    total = lanes[0]
    lanes[:columns] = 0
    return total


@inlined
def _encode_row(
    kind: int, w: _Floats, scales: _Floats, width: int, codes: _Bytes, lanes: Any
) -> Any:
    """A row's codes; its sums of squares and its largest error in scales. Overwrites ``w``."""
    worst = np.float32(0)
    for start in range(0, len(w), _CHUNK):
        stop = min(start + _CHUNK, len(w))
        _accumulate(w[start:stop], lanes[0])
        left = start
        while left < stop:
            group = left // width
            right = min((group + 1) * width, stop)
            largest = _encode_group(kind, w[left:right], scales[group], codes[left:right])
            worst = max(worst, _number(largest) / scales[group])
            left = right
        _accumulate(w[start:stop], lanes[1])
    return _folded(lanes[0], len(w)), _folded(lanes[1], len(w)), worst


@inlined
def _store_scales(
    maxima: NDArray[np.int32], largest_code: Any, dtype: int, measuring: bool, grid: _Floats
) -> bool:
    """A row of the grid from its groups' maxima; false if there is no number for it."""
    for group in range(len(maxima)):
        if maxima[group] >= _INFINITY:
            return False
        amax = _number(maxima[group])
        grid[group] = amax if measuring else _stored_scale(amax, largest_code, dtype)
        if grid[group] == np.float32(np.inf):
            return False
    return True


@cached(
    "float32(int64, uint8[:, ::1], float32[:, ::1], int64, int64, float32[::1], int64, int64,"
    " int64, int64, uint8[:, ::1], int64, float32[:, ::1], int64, int64, float64[::1],"
    " float64[::1])"
)
def transform(
    kind_in: int,
    codes_in: _Bytes,
    scales_in: _Floats,
    height_in: int,
    width_in: int,
    factors: _Floats,
    rotation: int,
    first_phase: int,
    last_phase: int,
    kind_out: int,
    codes_out: _Bytes,
    scale_dtype: int,
    scales_out: _Floats,
    height: int,
    width: int,
    signal: NDArray[np.float64],
    noise: NDArray[np.float64],
) -> np.float32:
    """One row block from source to target.

    A row is decoded once where its scales come from it alone, and twice where they come from
    several rows: decoding costs less than keeping float32 numbers beyond the cache would.

    Args:
        kind_in: of ``KINDS``.
        codes_in: ``[rows, in * itemsize]``, the stored bytes.
        scales_in: the grid of the source's scales; not looked at for plain dtypes.
        height_in: rows that share a scale of the source.
        width_in: columns that share one.
        factors: ``[in]``, or empty.
        rotation: the size of the blocks that are rotated, or 0.
        first_phase: ``MEASURE``, or ``ENCODE`` to take the scales from ``scales_out``.
        last_phase: ``ENCODE``, or ``MEASURE`` to leave maxima in ``scales_out``.
        kind_out: of ``KINDS``, one of the 8-bit ones.
        codes_out: ``[rows, in]``; for measuring alone of the height 0.
        scale_dtype: of ``KINDS``; scales are rounded to it.
        scales_out: the grid of the target's scales.
        height: rows that share a scale of the target.
        width: columns that share one.
        signal: ``[rows]``, as in ``RowErrors``.
        noise: ``[rows]``, as in ``RowErrors``.

    Returns:
        The largest error in scales, or ``REFUSED``.
    """
    rows, columns = len(codes_in), codes_out.shape[1]
    w, lanes = np.empty(columns, np.float32), np.zeros((2, _LANES))
    maxima = np.empty(scales_out.shape[1], np.int32)
    worst, fine = np.float32(0), True
    largest_code, measuring = _LARGEST[kind_out - INT8], last_phase == MEASURE
    for top in range(0, rows, height):
        bottom, grid = min(top + height, rows), scales_out[top // height]
        maxima[:] = 0
        for phase in range(first_phase, last_phase + 1):
            for i in range(top, bottom):
                if phase == first_phase or height > 1:
                    scales = scales_in[i // height_in]
                    fine = _decode_row(
                        kind_in, codes_in[i], scales, width_in, factors, rotation, w, maxima, width
                    )
                if not fine:
                    return np.float32(REFUSED)
                if phase == ENCODE:
                    sums = _encode_row(kind_out, w, grid, width, codes_out[i], lanes)
                    signal[i], noise[i] = sums[0], sums[1]
                    worst = max(worst, sums[2])
            if phase == MEASURE and not _store_scales(
                maxima, largest_code, scale_dtype, measuring, grid
            ):
                return np.float32(REFUSED)
    # An infinite error: a code is beyond float32, or a scale that was given is far too small.
    return np.float32(REFUSED) if worst == np.float32(np.inf) else worst


@inlined
def _weighted_errors(errors: _Floats, counts: _Doubles, unit: Any) -> Any:
    """The sum of ``clip_search``'s terms, whole numbers; adds them up in any order."""
    rounding = np.float64(2.0**52)
    none = np.float64(2.0**52).view(np.int64)
    total = np.int64(0)
    for j in range(len(errors)):
        off = np.float64(errors[j]) * unit
        term = min(off * off, np.float64(1)) * counts[j]
        total += np.float64(term + rounding).view(np.int64) - none
    return total


@inlined
def _search_group(
    kind: int,
    w: NDArray[np.float32],
    start: int,
    candidates: _Floats,
    counts: _Doubles,
    unit: Any,
    scratch: Any,
) -> Any:
    """The scale of the least weighted error, the first of several; ``w`` are all numbers of it.

    A candidate is given up as soon as it has lost.
    """
    errors, codes = scratch
    rows, width = w.shape[0], len(counts)
    least, chosen = np.int64(2**62), candidates[0]
    for scale in candidates:
        total = np.int64(0)
        for i in range(rows):
            for left in range(0, width, _SEARCHED):
                right = min(left + _SEARCHED, width)
                off = errors[: right - left]
                off[:] = w[i, start + left : start + right]
                _encode_group(kind, off, scale, codes[: right - left])
                total += _weighted_errors(off, counts[left:right], unit)
                if total >= least:
                    break
            if total >= least:
                break
        if total < least:
            least, chosen = total, scale
    return chosen


@cached()
def clip_search(
    kind_in: int,
    codes_in: _Bytes,
    scales_in: _Floats,
    height_in: int,
    width_in: int,
    factors: _Floats,
    rotation: int,
    kind_out: int,
    scale_dtype: int,
    ratios: _Floats,
    counts: _Doubles,
    scales_out: _Floats,
    height: int,
    width: int,
) -> bool:
    """The scales of one row block by ``formats.clip_search``.

    Args:
        kind_in: of ``KINDS``; this and what follows as in ``transform``.
        codes_in: ``[rows, in * itemsize]``.
        scales_in: the grid of the source's scales.
        height_in: rows that share one.
        width_in: columns that share one.
        factors: ``[in]``, or empty.
        rotation: the size of the blocks that are rotated, or 0.
        kind_out: of ``KINDS``, one of the 8-bit ones.
        scale_dtype: of ``KINDS``; candidates are rounded to it.
        ratios: the clip ratios, from 1 downwards.
        counts: ``[in]``, from ``clip_search.column_weights``.
        scales_out: receives the grid of the chosen scales.
        height: rows that share one.
        width: columns that share one.

    Returns:
        False for a block with a number that the plain path refuses.
    """
    rows, columns = len(codes_in), len(counts)
    w = np.empty((min(height, rows), columns), np.float32)
    maxima = np.empty(scales_out.shape[1], np.int32)
    candidates, largest_code = np.empty(len(ratios), np.float32), _LARGEST[kind_out - INT8]
    scratch = np.empty(_SEARCHED, np.float32), np.empty(_SEARCHED, np.uint8)
    for top in range(0, rows, height):
        bottom = min(top + height, rows)
        maxima[:] = 0
        for i in range(top, bottom):
            scales = scales_in[i // height_in]
            if not _decode_row(
                kind_in, codes_in[i], scales, width_in, factors, rotation, w[i - top], maxima, width
            ):
                return False
        for group in range(len(maxima)):
            amax = _number(maxima[group])
            for c in range(len(ratios)):
                candidates[c] = _stored_scale(amax * ratios[c], largest_code, scale_dtype)
            if candidates[0] == np.float32(np.inf):
                return False
            left, right = group * width, min((group + 1) * width, columns)
            exponent = np.float64(amax).view(np.int64) & np.int64(0x7FF << 52)
            unit = np.int64(np.int64(2045 << 52) - exponent).view(np.float64)
            scales_out[top // height, group] = _search_group(
                kind_out, w[: bottom - top], left, candidates, counts[left:right], unit, scratch
            )
    return True


@inlined
def _hold_int8(w: _Floats, decoded: _Floats, scale: Any, slack: Any) -> Any:
    """The bits of the largest error, in float64, divided by ``Int8Format.bound``."""
    step = np.float64(scale)
    half, clip, rounding = step * 0.5, 127.0 * step, 127.0 * 2.0**-23 * step
    largest = np.int64(0)
    for j in range(len(w)):
        magnitude = abs(np.float64(w[j]))
        bound = (max(magnitude - clip, half) + rounding) * slack
        error = abs(np.float64(decoded[j]) - np.float64(w[j]))
        largest = max(largest, np.float64(error / bound).view(np.int64))
    return largest


@inlined
def _hold_float8(w: _Floats, decoded: _Floats, scale: Any, slack: Any, grid: Any) -> Any:
    """The same with ``Float8Format.bound``, whose constants ``grid`` holds."""
    divisor, least, most, top = grid
    step = np.float64(scale)
    low, high, clip, rounding = step * least, step * most, top * step, 2.0**-24 * step
    largest = np.int64(0)
    for j in range(len(w)):
        magnitude = abs(np.float64(w[j]))
        inside = min(max(magnitude / divisor, low), high)
        bound = max(inside, magnitude - clip) + 2.0**-22 * magnitude + rounding
        error = abs(np.float64(decoded[j]) - np.float64(w[j]))
        largest = max(largest, np.float64(error / (bound * slack)).view(np.int64))
    return largest


@inlined
def _hold_group(kind: int, w: _Floats, decoded: _Floats, scale: Any, slack: Any) -> Any:
    if kind == INT8:
        return _hold_int8(w, decoded, scale, slack)
    if kind == FLOAT8_E4M3FN:
        return _hold_float8(w, decoded, scale, slack, (17.0, 2.0**-10, 16.0, 448.0))
    return _hold_float8(w, decoded, scale, slack, (9.0, 2.0**-17, 4096.0, 57344.0))


@inlined
def _subtract(w: _Floats, decoded: _Floats) -> None:
    for j in range(len(w)):
        decoded[j] = decoded[j] - w[j]


@inlined
def _prove_row(
    kind: int, w: _Floats, codes: _Bytes, scales: _Floats, width: int, slack: Any, scratch: Any
) -> Any:
    """A row's largest error by its bound, as bits, and the largest in scales; its sums in lanes."""
    decoded, lanes = scratch
    held, worst, fine = np.int64(0), np.float32(0), True
    for start in range(0, len(w), _CHUNK):
        stop = min(start + _CHUNK, len(w))
        values = decoded[: stop - start]
        fine &= _decode_chunk(kind, codes, scales, width, start, stop, values)[0]
        left = start
        while left < stop:
            group = left // width
            right = min((group + 1) * width, stop)
            numbers, off, scale = w[left:right], values[left - start : right - start], scales[group]
            held = max(held, _hold_group(kind, numbers, off, scale, slack))
            _subtract(numbers, off)
            worst = max(worst, _number(_absmax(off)) / scale)
            left = right
        _accumulate(w[start:stop], lanes[0])
        _accumulate(values, lanes[1])
    return held, worst, fine


@cached()
def prove(
    kind_in: int,
    codes_in: _Bytes,
    scales_in: _Floats,
    height_in: int,
    width_in: int,
    factors: _Floats,
    rotation: int,
    kind_out: int,
    codes_out: _Bytes,
    scales_out: _Floats,
    height: int,
    width: int,
    slack: float,
    amax: _Floats,
    signal: _Doubles,
    noise: _Doubles,
) -> tuple[np.float64, np.float32]:
    """One row block held to its source.

    Args:
        kind_in: of ``KINDS``; this and what follows as in ``transform``.
        codes_in: ``[rows, in * itemsize]``.
        scales_in: the grid of the source's scales.
        height_in: rows that share one.
        width_in: columns that share one.
        factors: ``[in]``, or empty.
        rotation: the size of the blocks that are rotated, or 0.
        kind_out: of ``KINDS``, one of the 8-bit ones.
        codes_out: ``[rows, in]``, what is held to the source.
        scales_out: the grid of its scales, which are positive.
        height: rows that share one.
        width: columns that share one.
        slack: bounds are multiplied by it.
        amax: receives the absolute maxima of the source in the target's groups.
        signal: ``[rows]``, as in ``RowErrors``.
        noise: ``[rows]``, as in ``RowErrors``.

    Returns:
        The largest error divided by its bound, or ``REFUSED``; and the largest in scales.
    """
    rows, columns = codes_out.shape
    w, lanes = np.empty(columns, np.float32), np.zeros((2, _LANES))
    scratch = np.empty(_CHUNK, np.float32), lanes
    maxima = np.empty(amax.shape[1], np.int32)
    held, worst = np.int64(0), np.float32(0)
    for i in range(rows):
        if i % height == 0:
            maxima[:] = 0
        scales, grid = scales_in[i // height_in], scales_out[i // height]
        fine = _decode_row(
            kind_in, codes_in[i], scales, width_in, factors, rotation, w, maxima, width
        )
        found = _prove_row(kind_out, w, codes_out[i], grid, width, slack, scratch)
        if not (fine and found[2]):
            return np.float64(REFUSED), np.float32(REFUSED)
        held, worst = max(held, found[0]), max(worst, found[1])
        signal[i], noise[i] = _folded(lanes[0], columns), _folded(lanes[1], columns)
        for group in range(len(maxima)):
            amax[i // height, group] = _number(maxima[group])
    return np.int64(held).view(np.float64), worst


@cached("void(float32[:, ::1], float64[::1])")
def squares(block: _Floats, sums: _Doubles) -> None:
    """``error.sums_of_squares``: of each row of a block, in ``sums``."""
    lanes = np.zeros(_LANES)
    for i in range(len(block)):
        for start in range(0, block.shape[1], _CHUNK):
            _accumulate(block[i, start : start + _CHUNK], lanes)
        sums[i] = _folded(lanes, block.shape[1])


@inlined
def _raise_each(w: _Floats, largest: NDArray[np.int32]) -> None:
    for j in range(len(w)):
        bits = _magnitude(w[j])
        if bits > largest[j]:
            largest[j] = bits


@cached()
def column_absmax(
    kind: int, codes: _Bytes, scales: _Floats, height: int, width: int, out: _Floats
) -> bool:
    """Raise ``out`` to each column's largest magnitude; false if a code is no number."""
    columns = len(out)
    w, largest = np.empty(_CHUNK, np.float32), out.view(np.int32)
    for i in range(len(codes)):
        grid = scales[i // height]
        for start in range(0, columns, _CHUNK):
            stop = min(start + _CHUNK, columns)
            numbers = w[: stop - start]
            if not _decode_chunk(kind, codes[i], grid, width, start, stop, numbers)[0]:
                return False
            _raise_each(numbers, largest[start:stop])
    return True
