"""SmoothQuant factors from measured input maxima and the weight's own column maxima."""

from __future__ import annotations

import torch
from torch import Tensor


def smoothquant_factors(input_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (SmoothQuant, arXiv 2211.10438, eq. 4).

    Args:
        input_absmax: the largest absolute input of each channel, float32 ``[in]``.
        weight_absmax: the largest absolute weight of each column, float32 ``[in]``.
        alpha: 0 leaves everything to the weights, 1 moves everything from the activations.

    Returns:
        float32 ``[in]``, finite and positive. A channel whose inputs or weights are all zero was
        not measured or does not matter: its factor is exactly 1.
    """
    inputs, weights = input_absmax.double(), weight_absmax.double()
    factors = (inputs.pow(alpha) / weights.pow(1.0 - alpha)).float()
    smallest = torch.finfo(torch.float32).tiny
    usable = (inputs > 0) & (weights > 0) & factors.isfinite() & (factors >= smallest)
    return torch.where(usable, factors, torch.ones_like(factors))
