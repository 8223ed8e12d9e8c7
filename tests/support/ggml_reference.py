"""How ggml chooses scales for q4_k and q6_k, in NumPy: the errors that ours are held against.

The algorithm, not the bytes: sums are taken in NumPy's order. As in the reference quantizers of
llama.cpp, q4_k searches 21 divisions of each sub-block's range, by least squares weighted by
``rms + |x|``, and q6_k 19 divisions, weighted by ``x^2``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_EPSILON = 1e-15


def _quotient(numerator: Floats, denominator: Floats) -> Floats:
    """0 where the denominator is."""
    safe = np.where(denominator == 0, np.float32(1), denominator)
    result: Floats = np.where(denominator == 0, np.float32(0), numerator / safe)
    return result


def _line(x: Floats, weights: Floats, levels: int) -> tuple[Floats, Floats]:
    """Scale and (positive) minimum of each sub-block, a row of ``x``."""
    low = np.minimum(x.min(1), 0)
    span = x.max(1) - low

    def coded(divisions: float) -> Floats:
        codes = np.rint(
            _quotient(np.full_like(span, divisions), span)[:, None] * (x - low[:, None])
        )
        clipped: Floats = np.clip(codes, 0, levels)
        return clipped

    def cost(scale: Floats, minimum: Floats, codes: Floats) -> Floats:
        total: Floats = (weights * (scale[:, None] * codes + minimum[:, None] - x) ** 2).sum(1)
        return total

    scale, minimum = span / np.float32(levels), low.copy()
    least = cost(scale, minimum, coded(levels))
    sum_w, sum_x = weights.sum(1), (weights * x).sum(1)
    for step in range(21):
        codes = coded(levels - 1 + 0.1 * step)
        sum_l, sum_ll = (weights * codes).sum(1), (weights * codes * codes).sum(1)
        sum_xl = (weights * codes * x).sum(1)
        det = sum_w * sum_ll - sum_l * sum_l
        new_scale = _quotient(sum_w * sum_xl - sum_x * sum_l, det)
        new_minimum = _quotient(sum_ll * sum_x - sum_l * sum_xl, det)
        above = new_minimum > 0
        new_scale = np.where(above, _quotient(sum_xl, sum_ll), new_scale)
        new_minimum = np.where(above, np.float32(0), new_minimum)
        error = cost(new_scale, new_minimum, codes)
        better = (det > 0) & (error < least)
        least = np.where(better, error, least)
        scale = np.where(better, new_scale, scale)
        minimum = np.where(better, new_minimum, minimum)
    return scale, -minimum


def q4_k(x: Floats) -> Floats:
    """What is read back of ``[n, 256]`` numbers."""
    blocks = x.reshape(-1, 32)
    weights = np.sqrt((blocks * blocks).mean(1, keepdims=True)) + np.abs(blocks)
    scale, minimum = (each.reshape(-1, 8) for each in _line(blocks, weights, 15))
    steps, offsets = (_six_bits(each) for each in (scale, minimum))
    codes = np.rint(_quotient(x.reshape(-1, 8, 32) + offsets[..., None], steps[..., None]))
    values: Floats = steps[..., None] * np.clip(codes, 0, 15) - offsets[..., None]
    return values.reshape(x.shape)


def _six_bits(numbers: Floats) -> Floats:
    """As multiples, up to 63, of a float16 number for each record."""
    largest = np.maximum(numbers.max(1, keepdims=True), 0)
    codes = np.clip(np.rint(_quotient(63 * numbers, largest)), 0, 63)
    stored: Floats = (largest / 63).astype(np.float16).astype(np.float32) * codes
    return stored


def q6_k(x: Floats) -> Floats:
    """What is read back of ``[n, 256]`` numbers."""
    blocks = x.reshape(-1, 16)
    weights = blocks * blocks
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)[:, 0]
    top = np.where(np.abs(top) < _EPSILON, np.float32(0), top)
    scale, best = np.zeros_like(top), np.zeros_like(top)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = _quotient(np.full_like(top, -(32 + 0.1 * step)), top)
        codes = np.clip(np.rint(inverse[:, None] * blocks), -32, 31)
        sum_xl, sum_ll = (weights * blocks * codes).sum(1), (weights * codes * codes).sum(1)
        better = sum_xl * sum_xl > best * sum_ll
        new_scale = _quotient(sum_xl, sum_ll)
        best = np.where(better, new_scale * sum_xl, best)
        scale = np.where(better, new_scale, scale)
    scale = scale.reshape(-1, 16)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)
    codes = np.clip(np.rint(_quotient(-128 * scale, largest)), -128, 127)
    d = (largest / -128).astype(np.float16).astype(np.float32)
    steps = (d * codes)[..., None]
    values: Floats = steps * np.clip(np.rint(_quotient(x.reshape(-1, 16, 16), steps)), -32, 31)
    return values.reshape(x.shape)
