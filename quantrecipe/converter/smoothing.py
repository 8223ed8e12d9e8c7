"""SmoothQuant factors from measured input maxima and the weight's own column maxima."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def smoothquant_factors(
    input_absmax: Tensor, weight_absmax: Tensor, alpha: float, *, power_of_two: bool = False
) -> Tensor:
    """``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (SmoothQuant, arXiv 2211.10438, eq. 4).

    Args:
        input_absmax: the largest absolute input of each channel, float32 ``[in]``.
        weight_absmax: the largest absolute weight of each column, float32 ``[in]``.
        alpha: 0 leaves everything to the weights, 1 moves everything from the activations.
        power_of_two: whether factors are rounded to the nearest power of two, by ratio.

    Returns:
        float32 ``[in]``, finite and positive. A channel whose inputs or weights are all zero was
        not measured or does not matter: its factor is exactly 1.
    """
    inputs, weights = input_absmax.double(), weight_absmax.double()
    factors = (inputs.pow(alpha) / weights.pow(1.0 - alpha)).float()
    smallest = torch.finfo(torch.float32).tiny
    usable = (inputs > 0) & (weights > 0) & factors.isfinite() & (factors >= smallest)
    factors = torch.where(usable, factors, torch.ones_like(factors))
    return _power_of_two(factors) if power_of_two else factors


def _power_of_two(factors: Tensor) -> Tensor:
    """The nearest power of two by ratio, 2^127 at most; float32 to float32."""
    mantissas, exponents = np.frexp(factors.numpy())  # mantissas from 1/2 to 1, exactly
    # The square of 24 bits is exact in float64, and half is the square of where two are as near.
    up = np.square(mantissas.astype(np.float64)) >= 0.5
    powers = np.minimum(exponents - 1 + up, 127).astype(np.int32)
    return torch.from_numpy(np.ldexp(np.float32(1), powers))
