"""Bootstrap intervals of a mean over prompts: percentile, and bias-corrected and accelerated.

Prompts are drawn with replacement. Give the differences of two variants on the same prompts for a
paired interval.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

RESAMPLES: Final = 10_000
_BLOCK_NUMBERS: Final = 1 << 21
_NORMAL: Final = NormalDist()


def times_drawn(count: int, resamples: int, seed: int) -> Values:
    """How often each prompt is in each resample.

    Args:
        count: of prompts.
        resamples: how many; memory is 8 bytes for each prompt of each.
        seed: of PCG64; the same one makes the same draws.

    Returns:
        Whole numbers ``[resamples, count]``; each row adds up to ``count``.
    """
    return np.concatenate(list(_draws(count, resamples, seed)))


def resampled_means(values: Values, resamples: int, seed: int) -> Values:
    """The mean of each resample of prompts, in bounded memory.

    Args:
        values: one number a prompt, ``[n]``, or several that are drawn together, ``[n, k]``.
        resamples: how many.
        seed: as for ``times_drawn``.

    Returns:
        ``[resamples]`` or ``[resamples, k]``.
    """
    count = len(values)
    return np.concatenate([times @ values / count for times in _draws(count, resamples, seed)])


def percentile_interval(means: Values, confidence: float) -> tuple[float, float]:
    """The middle of what resamples gave (Efron and Tibshirani 1993, section 13.3).

    Args:
        means: of every resample, ``[resamples]``.
        confidence: between 0 and 1.
    """
    low, high = np.quantile(means, ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)


def bca_interval(values: Values, means: Values, confidence: float) -> tuple[float, float] | None:
    """Bias-corrected and accelerated (Efron and Tibshirani 1993, equations 14.9 to 14.15).

    The acceleration comes from the jackknife, which for a mean is a sum over the numbers:
    ``sum d^3 / (6 (sum d^2)^1.5)``, with ``d`` the distances from the mean.

    Args:
        values: one number a prompt, ``[n]``.
        means: of every resample of them, ``[resamples]``.
        confidence: between 0 and 1.

    Returns:
        Low and high; ``None`` where there is no correction, since no two numbers differ or all
        resamples lie on one side of the mean.
    """
    mean = values.mean()
    # A resample that has the mean counts half on either side.
    below = float(((means < mean).mean() + (means <= mean).mean()) / 2)
    if np.ptp(values) == 0 or not 0 < below < 1:
        return None
    away = values - mean
    acceleration = float((away**3).sum() / (6 * (away**2).sum() ** 1.5))
    bias = _NORMAL.inv_cdf(below)

    def level(wanted: float) -> float:
        moved = bias + _NORMAL.inv_cdf(wanted)
        return _NORMAL.cdf(bias + moved / (1 - acceleration * moved))

    levels = level((1 - confidence) / 2), level((1 + confidence) / 2)
    low, high = np.quantile(means, levels)
    return float(low), float(high)


def _draws(count: int, resamples: int, seed: int) -> Iterator[Values]:
    """``times_drawn``, some rows at a time."""
    random = np.random.default_rng(seed)
    chances = np.full(count, 1 / count)
    rows = max(1, _BLOCK_NUMBERS // count)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        yield random.multinomial(count, chances, size=size).astype(np.float64)
