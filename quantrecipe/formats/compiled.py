"""The loops of ``transform``, compiled by numba: each row is decoded, scaled and coded in cache.

Only sums of errors may be reordered (``_summing``); everything else is float32 as written: no
contraction to fused multiply-add, no reciprocal, so codes and scales have the plain path's bits.
Every compiled function stays in this file: numba's disk cache notices a change of the file a
function is in, and of no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

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
_Bytes = NDArray[np.uint8]

_INFINITY: Final = np.int32(0x7F800000)
# float32 sums of this many squares keep their last digits, and w, codes and sums stay in L1.
_CHUNK: Final = 2048
# Between these no square of a row's largest number leaves float32, nor a sum of such squares.
_SAFE_ABSMAX: Final = (np.float32(2.0**-50), np.float32(2.0**50))
# Above this, squares that were lost as too small for float32 do not show in a row's sum.
_SAFE_NOISE: Final = 2.0**-90
_LARGEST: Final = (np.float32(127.0), np.float32(448.0), np.float32(57344.0))


_Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
_inlined: Final[_Compile] = numba.njit(nogil=True, error_model="numpy")
_summing: Final[_Compile] = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "nsz"})


def _cached(signature: str | None = None) -> _Compile:
    """Compiled once a machine, or in every process where there is no folder to cache in."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            kept: _Compile = numba.njit(signature, nogil=True, error_model="numpy", cache=True)
            return kept(function)
        except RuntimeError as no_folder:
            if "cannot cache" not in str(no_folder):
                raise
            fresh: _Compile = numba.njit(signature, nogil=True, error_model="numpy")
            return fresh(function)

    return decorate


@_inlined
def _bits(number: Any) -> Any:
    return np.float32(number).view(np.int32)


@_inlined
def _magnitude(number: Any) -> Any:
    """The bits of a float32 without its sign: in the order of magnitudes, then infinity, NaNs."""
    return np.int32(np.float32(number).view(np.int32) & np.int32(0x7FFFFFFF))


@_inlined
def _number(bits: Any) -> Any:
    return np.int32(bits).view(np.float32)


@_inlined
def _decode_16(bfloat16: bool, stored: NDArray[np.uint16], w: _Floats) -> bool:
    """bfloat16 is float32's upper half; float16 moved to float32's places is 2^-112 of itself."""
    if bfloat16:
        for j in range(len(w)):
            w[j] = _number(np.int32(stored[j]) << np.int32(16))
        return True
    largest = np.uint16(0)
    up = np.float32(2.0**112)
    for j in range(len(w)):
        magnitude = np.uint16(stored[j] & np.uint16(0x7FFF))
        if magnitude > largest:
            largest = magnitude
        sign = np.int32(stored[j] & np.uint16(0x8000)) << np.int32(16)
        w[j] = _number((np.int32(magnitude) << np.int32(13)) | sign) * up
    return bool(largest < np.uint16(0x7C00))


@_inlined
def _decode_32(stored: NDArray[np.uint32], w: _Floats) -> bool:
    for j in range(len(w)):
        w[j] = _number(stored[j])
    return True


@_inlined
def _decode_int8(stored: _Bytes, scale: Any, w: _Floats) -> bool:
    for j in range(len(w)):
        w[j] = np.float32(np.int8(stored[j])) * scale
    return True


@_inlined
def _e4m3fn(code: Any) -> Any:
    """Exponent and mantissa in float32's places, times what the biases differ by: exact."""
    bits = np.int32((np.int32(np.int8(code)) << np.int32(20)) & np.int32(-0x78100000))
    return _number(bits) * np.float32(2.0**120)


@_inlined
def _e5m2(code: Any) -> Any:
    bits = np.int32((np.int32(np.int8(code)) << np.int32(21)) & np.int32(-0x70200000))
    return _number(bits) * np.float32(2.0**112)


@_inlined
def _all_below(stored: _Bytes, limit: Any) -> bool:
    """Whether every fp8 code is a number: the magnitude bits of those that are none come last."""
    largest = np.uint8(0)
    for j in range(len(stored)):
        magnitude = np.uint8(stored[j] & np.uint8(0x7F))
        if magnitude > largest:
            largest = magnitude
    return bool(largest < limit)


@_inlined
def _decode_e4m3fn(stored: _Bytes, scale: Any, w: _Floats) -> bool:
    for j in range(len(w)):
        w[j] = _e4m3fn(stored[j]) * scale
    return bool(_all_below(stored, np.uint8(0x7F)))


@_inlined
def _decode_e5m2(stored: _Bytes, scale: Any, w: _Floats) -> bool:
    for j in range(len(w)):
        w[j] = _e5m2(stored[j]) * scale
    return bool(_all_below(stored, np.uint8(0x7C)))


@_inlined
def _decode_row(
    kind: int, stored: _Bytes, scales: _Floats, width: int, factors: _Floats, w: _Floats
) -> bool:
    """A stored row as float32 in ``w``; false if a code is no number."""
    if kind in (BFLOAT16, FLOAT16):
        fine = _decode_16(kind == BFLOAT16, stored.view(np.uint16), w)
    elif kind == FLOAT32:
        fine = _decode_32(stored.view(np.uint32), w)
    else:
        fine = True
        for group in range(len(scales)):
            run, scale = slice(group * width, (group + 1) * width), scales[group]
            if kind == INT8:
                _decode_int8(stored[run], scale, w[run])
            elif kind == FLOAT8_E4M3FN:
                fine &= _decode_e4m3fn(stored[run], scale, w[run])
            else:
                fine &= _decode_e5m2(stored[run], scale, w[run])
    if len(factors) == len(w):
        for j in range(len(w)):
            w[j] *= factors[j]
    return bool(fine)


@_inlined
def _absmax(w: _Floats) -> np.int32:
    """The bits of the largest magnitude; infinities, then NaNs, are larger than any number."""
    largest = np.int32(0)
    for j in range(len(w)):
        bits = _magnitude(w[j])
        if bits > largest:
            largest = bits
    return largest


@_inlined
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


@_inlined
def _encode_int8(w: _Floats, scale: Any, codes: _Bytes) -> None:
    # Added to this, a number in [-127, 127] is rounded to an integer, ties to even, and its low
    # byte is that integer's two's complement.
    shifter = np.float32(1.5 * 2.0**23)
    top = np.float32(127)
    for j in range(len(w)):
        ratio = w[j] / scale
        ratio = min(max(ratio, -top), top)
        codes[j] = np.uint8(_bits(ratio + shifter) & np.int32(0xFF))


@_inlined
def _encode_float8(
    w: _Floats, scale: Any, codes: _Bytes, mantissa: int, bias: int, top: Any
) -> None:
    """To nearest, ties to even: normal numbers by adding to the bits, the others by a float add."""
    shift = np.int32(23 - mantissa)
    half = np.int32((1 << (22 - mantissa)) - 1)
    rebias = np.int32((127 - bias) << mantissa)
    normal = np.int32((128 - bias) << 23)
    # Its unit in the last place is the smallest subnormal.
    shifter = np.int32((127 + 1 - bias - mantissa + 23) << 23)
    for j in range(len(w)):
        bits = _bits(w[j] / scale)
        sign = np.int32((bits >> np.int32(24)) & np.int32(0x80))
        magnitude = min(np.int32(bits & np.int32(0x7FFFFFFF)), top)
        odd = np.int32((magnitude >> shift) & np.int32(1))
        rounded = np.int32((np.int32(magnitude + half + odd) >> shift) - rebias)
        subnormal = np.int32(_bits(_number(magnitude) + _number(shifter)) - shifter)
        code = subnormal if magnitude < normal else rounded
        codes[j] = np.uint8(code | sign)


@_inlined
def _errors_int8(w: _Floats, scale: Any, codes: _Bytes, error: _Floats) -> Any:
    """What the codes are off by, and the bits of the largest of it."""
    largest = np.int32(0)
    for j in range(len(w)):
        error[j] = np.float32(np.int8(codes[j])) * scale - w[j]
        largest = max(largest, _magnitude(error[j]))
    return largest


@_inlined
def _errors_e4m3fn(w: _Floats, scale: Any, codes: _Bytes, error: _Floats) -> Any:
    largest = np.int32(0)
    for j in range(len(w)):
        error[j] = _e4m3fn(codes[j]) * scale - w[j]
        largest = max(largest, _magnitude(error[j]))
    return largest


@_inlined
def _errors_e5m2(w: _Floats, scale: Any, codes: _Bytes, error: _Floats) -> Any:
    largest = np.int32(0)
    for j in range(len(w)):
        error[j] = _e5m2(codes[j]) * scale - w[j]
        largest = max(largest, _magnitude(error[j]))
    return largest


@_summing
def _squares(numbers: _Floats) -> Any:
    """The one sum that may be reordered, apart from all else that must not be."""
    total = np.float32(0)
    for j in range(len(numbers)):
        total += numbers[j] * numbers[j]
    return total


@_inlined
def _value(kind: int, code: Any) -> Any:
    if kind == INT8:
        return np.float32(np.int8(code))
    if kind == FLOAT8_E4M3FN:
        return _e4m3fn(code)
    return _e5m2(code)


@_inlined
def _exact_sums(kind: int, w: _Floats, codes: _Bytes, scales: _Floats, width: int) -> Any:
    """A row's sums in float64, from left to right, where float32 squares would not do."""
    signal, noise = 0.0, 0.0
    for j in range(len(w)):
        error = np.float64(np.float32(_value(kind, codes[j]) * scales[j // width] - w[j]))
        signal += np.float64(w[j]) * np.float64(w[j])
        noise += error * error
    return signal, noise


@_inlined
def _encode_chunk(kind: int, w: _Floats, scale: Any, codes: _Bytes, error: _Floats) -> Any:
    """Codes, then from them the errors and the bits of the largest error."""
    if kind == INT8:
        _encode_int8(w, scale, codes)
        return _errors_int8(w, scale, codes, error)
    if kind == FLOAT8_E4M3FN:
        _encode_float8(w, scale, codes, 3, 7, np.int32(0x43E00000))
        return _errors_e4m3fn(w, scale, codes, error)
    _encode_float8(w, scale, codes, 2, 15, np.int32(0x47600000))
    return _errors_e5m2(w, scale, codes, error)


@_inlined
def _encode_row(
    kind: int, w: _Floats, amax: Any, scales: _Floats, width: int, codes: _Bytes, error: _Floats
) -> Any:
    """A row's codes; its sums of squares and its largest error in scales."""
    signal, noise, worst = 0.0, 0.0, np.float32(0)
    for group in range(len(scales)):
        last, scale = min((group + 1) * width, len(w)), scales[group]
        largest = np.int32(0)
        for start in range(group * width, last, _CHUNK):
            stop = min(start + _CHUNK, last)
            numbers, off = w[start:stop], error[: stop - start]
            bits = _encode_chunk(kind, numbers, scale, codes[start:stop], off)
            signal += np.float64(_squares(numbers))
            noise += np.float64(_squares(off))
            largest = max(largest, bits)
        worst = max(worst, _number(largest) / scale)
    lost = noise < _SAFE_NOISE and worst > np.float32(0)
    if amax > np.float32(0) and (lost or amax < _SAFE_ABSMAX[0] or amax > _SAFE_ABSMAX[1]):
        signal, noise = _exact_sums(kind, w, codes, scales, width)
    return signal, noise, worst


@_inlined
def _raise_maxima(w: _Floats, maxima: NDArray[np.int32], width: int) -> np.int32:
    """Raise each group's maximum; return the row's."""
    largest = np.int32(0)
    for group in range(len(maxima)):
        bits = _absmax(w[group * width : (group + 1) * width])
        maxima[group] = max(maxima[group], bits)
        largest = max(largest, bits)
    return largest


@_inlined
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


@_cached(
    "float32(int64, uint8[:, ::1], float32[:, ::1], int64, int64, float32[::1], int64, int64,"
    " int64, uint8[:, ::1], int64, float32[:, ::1], int64, int64, float64[::1], float64[::1])"
)
def transform(
    kind_in: int,
    codes_in: _Bytes,
    scales_in: _Floats,
    height_in: int,
    width_in: int,
    factors: _Floats,
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
    w, error = np.empty(columns, np.float32), np.empty(_CHUNK, np.float32)
    maxima = np.empty(scales_out.shape[1], np.int32)
    worst, amax, fine = np.float32(0), np.int32(0), True
    largest_code, measuring = _LARGEST[kind_out - INT8], last_phase == MEASURE
    for top in range(0, rows, height):
        bottom, grid = min(top + height, rows), scales_out[top // height]
        maxima[:] = 0
        for phase in range(first_phase, last_phase + 1):
            for i in range(top, bottom):
                if phase == first_phase or height > 1:
                    scales = scales_in[i // height_in]
                    fine = _decode_row(kind_in, codes_in[i], scales, width_in, factors, w)
                    amax = _raise_maxima(w, maxima, width)
                    fine &= amax < _INFINITY
                if not fine:
                    return np.float32(REFUSED)
                if phase == ENCODE:
                    row = codes_out[i]
                    sums = _encode_row(kind_out, w, _number(amax), grid, width, row, error)
                    signal[i], noise[i] = sums[0], sums[1]
                    worst = max(worst, sums[2])
            if phase == MEASURE and not _store_scales(
                maxima, largest_code, scale_dtype, measuring, grid
            ):
                return np.float32(REFUSED)
    return worst


@_cached()
def column_absmax(
    kind: int, codes: _Bytes, scales: _Floats, height: int, width: int, out: _Floats
) -> bool:
    """Raise ``out`` to each column's largest magnitude; false if a code is no number."""
    columns = len(out)
    w, none = np.empty(columns, np.float32), np.empty(0, np.float32)
    largest = out.view(np.int32)
    for i in range(len(codes)):
        if not _decode_row(kind, codes[i], scales[i // height], width, none, w):
            return False
        for j in range(columns):
            bits = _magnitude(w[j])
            if bits > largest[j]:
                largest[j] = bits
    return True
