"""Loops for formats whose scales belong to short runs of a row, compiled by numba.

They take float32 numbers, run after run ``[runs, width]``, and leave errors in their place. As in
``compiled`` everything is float32 as written: no contraction to fused multiply-add, and codes and
errors have the plain path's bits.

No compiled function is shared with ``compiled``: numba's disk cache notices a change of the file
that a function is in, and of no other. The levels of nf4, which are taken from its file, never
change.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantrecipe.formats.compiling import cached, inlined
from quantrecipe.formats.nf4 import BETWEEN, LEVELS

_Floats = NDArray[np.float32]
_Bytes = NDArray[np.uint8]


_INFINITY: Final = np.int32(0x7F800000)
_BETWEEN: Final = np.array(BETWEEN, np.float32)
_LEVELS: Final = np.array(LEVELS, np.float32)

# Of a small float type: its bits, those of its mantissa, the bias of its exponent, and the float32
# bits of its largest number.
_E2M1: Final = (4, 1, 1, np.int32(0x40C00000))
_E4M3: Final = (8, 3, 7, np.int32(0x43E00000))


@inlined
def _bits(number: Any) -> Any:
    return np.float32(number).view(np.int32)


@inlined
def _number(bits: Any) -> Any:
    return np.int32(bits).view(np.float32)


@inlined
def _magnitude(number: Any) -> Any:
    """The bits of a float32 without its sign: in the order of magnitudes, then infinity, NaNs."""
    return np.int32(np.float32(number).view(np.int32) & np.int32(0x7FFFFFFF))


@inlined
def _ordered(number: Any) -> Any:
    """The bits of a float32 in the order of numbers, and back again."""
    bits = np.int32(number)
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


# Loops over a run count to a width that is not known when they are compiled: a constant one would
# be unrolled before it is vectorized, and stay scalar.
#
# Each format has such a loop of its own. In one that formats share, what they differ in would be
# arguments, no constants when it is compiled, and it has been seen to take two fifths longer.


@cached()
def absmax(w: _Floats, maxima: _Floats) -> bool:
    """The largest magnitude of each run; false if one is no number."""
    most = np.int32(0)
    for run in range(len(w)):
        largest = np.int32(0)
        for j in range(w.shape[1]):
            largest = max(largest, _magnitude(w[run, j]))
        maxima[run] = _number(largest)
        most = max(most, largest)
    return bool(most < _INFINITY)


@cached()
def extremes(w: _Floats, low: _Floats, high: _Floats) -> bool:
    """The smallest and the largest number of each run and 0; false if one is no number."""
    bottom, top = np.int32(0), np.int32(0)
    for run in range(len(w)):
        least, most = np.int32(0), np.int32(0)
        for j in range(w.shape[1]):
            place = _ordered(_bits(w[run, j]))
            least, most = min(least, place), max(most, place)
        low[run], high[run] = _number(_ordered(least)), _number(_ordered(most))
        bottom, top = min(bottom, least), max(top, most)
    return bool(_ordered(_INFINITY | np.int32(-0x80000000)) < bottom and top < _INFINITY)


@inlined
def _float_code(ratio: Any, width: int, mantissa: int, bias: int, top: Any) -> Any:
    """The code of the nearest number of a small float type, ties to even, and that number.

    Added to ``step``, a power of two, a magnitude is rounded to the step of the codes around it:
    the last place of the sum counts those steps, and what is left without ``step`` is their value.
    The sign of both is the ratio's, even of zeros.
    """
    shift = np.int32(23 - mantissa)
    normal = np.int32((128 - bias) << 23)
    bits = _bits(ratio)
    magnitude = min(np.int32(bits & np.int32(0x7FFFFFFF)), top)
    power = max(np.int32(magnitude & np.int32(0x7F800000)), normal)
    step = np.int32(power + np.int32((23 - mantissa) << 23))
    shifted = _number(magnitude) + _number(step)
    code = np.int32(np.int32(_bits(shifted) - step) + np.int32(np.int32(power - normal) >> shift))
    sign = np.int32(bits & np.int32(-0x80000000))
    code |= np.int32((sign >> np.int32(32 - width)) & np.int32(1 << (width - 1)))
    return code, _number(_bits(shifted - _number(step)) | sign)


@inlined
def _in_scales(largest: Any, scale: Any) -> Any:
    """An error's bits divided by a scale, as bits: in the order of magnitudes, NaNs last."""
    divisor = abs(scale)
    return _bits(_number(largest) / (divisor if divisor != np.float32(0) else np.float32(1)))


@inlined
def _leave(w: _Floats, codes: _Bytes, run: int, j: int, code: Any, decoded: Any) -> Any:
    """Leave a number's code, and its error in its place; the bits of the error's magnitude."""
    codes[run, j] = np.uint8(code)
    w[run, j] = decoded - w[run, j]
    return _magnitude(w[run, j])


@cached()
def encode_nvfp4(w: _Floats, by: _Floats, scales: _Floats, codes: _Bytes) -> np.int32:
    """Quotients by ``by``; codes are 0 where that is 0."""
    worst = np.int32(0)
    for run in range(len(w)):
        divisor, scale = by[run], scales[run]
        largest = np.int32(0)
        if divisor == np.float32(0):
            for j in range(w.shape[1]):
                # -0.0 less a number is its negative, of zeros too.
                largest = max(largest, _leave(w, codes, run, j, 0, np.float32(-0.0)))
        else:
            for j in range(w.shape[1]):
                code, level = _float_code(w[run, j] / divisor, *_E2M1)
                largest = max(largest, _leave(w, codes, run, j, code, level * scale))
        worst = max(worst, _in_scales(largest, scale))
    return worst


@cached()
def encode_mxfp4(w: _Floats, by: _Floats, scales: _Floats, codes: _Bytes) -> np.int32:
    """Products with ``by``."""
    worst = np.int32(0)
    for run in range(len(w)):
        factor, scale = by[run], scales[run]
        largest = np.int32(0)
        for j in range(w.shape[1]):
            code, level = _float_code(w[run, j] * factor, *_E2M1)
            largest = max(largest, _leave(w, codes, run, j, code, level * scale))
        worst = max(worst, _in_scales(largest, scale))
    return worst


@cached()
def encode_mxfp8(w: _Floats, by: _Floats, scales: _Floats, codes: _Bytes) -> np.int32:
    """Products with ``by``."""
    worst = np.int32(0)
    for run in range(len(w)):
        factor, scale = by[run], scales[run]
        largest = np.int32(0)
        for j in range(w.shape[1]):
            code, level = _float_code(w[run, j] * factor, *_E4M3)
            largest = max(largest, _leave(w, codes, run, j, code, level * scale))
        worst = max(worst, _in_scales(largest, scale))
    return worst


@cached()
def encode_nf4(w: _Floats, by: _Floats, scales: _Floats, codes: _Bytes) -> np.int32:
    """Products with ``by``."""
    worst = np.int32(0)
    for run in range(len(w)):
        factor, scale = by[run], scales[run]
        largest = np.int32(0)
        for j in range(w.shape[1]):
            ratio = w[run, j] * factor
            code, level = np.int32(0), _LEVELS[0]
            for k in range(15):
                above = ratio > _BETWEEN[k]
                code += np.int32(above)
                level = _LEVELS[k + 1] if above else level
            largest = max(largest, _leave(w, codes, run, j, code, level * scale))
        worst = max(worst, _in_scales(largest, scale))
    return worst


@cached()
def encode_int4(
    w: _Floats, by: _Floats, scales: _Floats, zeros: _Floats, least: Any, codes: _Bytes
) -> np.int32:
    """Quotients by ``by``; the code for 0 is that of ``zeros``, the first one ``least``."""
    shifter = np.float32(1.5 * 2.0**23)
    worst, most, wide = np.int32(0), np.float32(15), np.float32(2.0**20)
    for run in range(len(w)):
        divisor, scale, zero = by[run], scales[run], zeros[run]
        largest = np.int32(0)
        for j in range(w.shape[1]):
            ratio = min(max(w[run, j] / divisor, -wide), wide)
            code = min(max((ratio + shifter) - shifter + zero, least), most)
            decoded = (code - zero) * scale
            largest = max(largest, _leave(w, codes, run, j, np.int32(code), decoded))
        worst = max(worst, _in_scales(largest, scale))
    return worst


@cached()
def encode_llm_int8(w: _Floats, by: _Floats, scales: _Floats, codes: _Bytes) -> np.int32:
    """Products with ``by``."""
    shifter, top = np.float32(1.5 * 2.0**23), np.float32(127)
    zero, step = _bits(np.float32(1.5 * 2.0**23)), np.float32(1.0 / 127.0)
    worst = np.int32(0)
    for run in range(len(w)):
        factor, scale = by[run], scales[run]
        largest = np.int32(0)
        for j in range(w.shape[1]):
            shifted = min(max(w[run, j] * factor, -top), top) + shifter
            code = np.int32(_bits(shifted) - zero)
            code = np.int32(min(max(code, np.int32(-128)), np.int32(127)))
            decoded = (shifted - shifter) * scale * step
            largest = max(largest, _leave(w, codes, run, j, code, decoded))
        worst = max(worst, _in_scales(largest, scale))
    return worst


ENCODERS: Final = {
    "nvfp4": encode_nvfp4,
    "mxfp4": encode_mxfp4,
    "mxfp8": encode_mxfp8,
    "nf4": encode_nf4,
    "int4": encode_int4,
    "llm_int8": encode_llm_int8,
}
"""By format. Each takes

* ``w``, float32 ``[runs, width]``, and leaves ``float32(w_hat - w)`` in its place,
* ``by``, what each run is multiplied by or divided by (``ScaledFormat.operand``),
* ``scales``, what its codes are decoded with,
* ``codes``, uint8 ``[runs, width]``, which receives them (before it, for int4, zero points),

and returns the largest error of a run divided by its scale, as the bits of a float32.
"""
