"""What was measured of one module's input."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ModuleStatistics:
    """What was measured of one module's input; ``quantrecipe.schema.statistics`` says it in full.

    ``B`` is the number of timestep bins, ``I`` that of input features. What was not measured is
    ``None``. The methods take all bins together; they count by their tokens, or alike in a file
    that does not say how many there were.

    Attributes:
        input_absmax: float32 ``[B, I]``.
        input_second_moment: float64 ``[B, I]``.
        input_moments: float64 ``[B, 4]``.
        tokens: int64 ``[B]``.
        token_absmax_histogram: int64 ``[B, 256]``.
        token_absmax_second_moments: float64 ``[B]``; the file's ``token_absmax_second_moment``.
        weight_absmax: float32 ``[I]``.
        input_tokens: bfloat16 or float32 ``[K, I]``.
        input_token_bins: int64 ``[K]``.
        input_token_keys: int64 ``[K]``, ascending.
    """

    input_absmax: Tensor
    input_second_moment: Tensor | None = None
    input_moments: Tensor | None = None
    tokens: Tensor | None = None
    token_absmax_histogram: Tensor | None = None
    token_absmax_second_moments: Tensor | None = None
    weight_absmax: Tensor | None = None
    input_tokens: Tensor | None = None
    input_token_bins: Tensor | None = None
    input_token_keys: Tensor | None = None

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> ModuleStatistics:
        """From tensors by the names that a statistics file has for them."""
        return cls(**{_ATTRIBUTES.get(name, name): tensor for name, tensor in tensors.items()})

    def tensors(self) -> dict[str, Tensor]:
        """What was measured, by the names that a statistics file has for it."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {_NAMES.get(name, name): value for name, value in found.items() if value is not None}

    def absmax(self) -> Tensor:
        """The largest absolute value of each channel, float32 ``[I]``."""
        return self.input_absmax.amax(0)

    def second_moment(self) -> Tensor | None:
        """The mean of ``x^2`` of each channel over all tokens, float64 ``[I]``."""
        return self._mean(self.input_second_moment)

    def token_absmax_second_moment(self) -> float | None:
        """The mean over all tokens of the square of a token's largest absolute value."""
        mean = self._mean(self.token_absmax_second_moments)
        return None if mean is None else float(mean)

    def kurtosis(self) -> float | None:
        """The fourth central moment of all numbers over the square of the second: 3 for Gaussians.

        0 where all numbers are the same, to the precision of float64.
        """
        moments = self._mean(self.input_moments)
        if moments is None:
            return None
        first, second, third, fourth = moments.tolist()
        variance = second - first**2
        if variance <= 16 * torch.finfo(torch.float64).eps * second:
            return 0.0
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        return float(central / variance**2)

    def max_to_median(self) -> float:
        """The largest channel maximum over their median; 1 where all are 0.

        ``inf`` where more than half are 0, and not all.
        """
        absmax = self.absmax().double()
        largest, median = float(absmax.max()), float(absmax.quantile(0.5))
        if largest == 0:
            return 1.0
        return largest / median if median > 0 else math.inf

    def tokens_kept(self) -> Tensor | None:
        """The tokens of the reservoir, float32 ``[K, I]``."""
        return None if self.input_tokens is None else self.input_tokens.float()

    def _mean(self, means: Tensor | None) -> Tensor | None:
        """The mean of what bins have the means of."""
        if means is None:
            return None
        if self.tokens is None:
            weights = [1 / len(means)] * len(means)
        else:
            weights = (self.tokens.double() / self.tokens.sum().clamp(min=1)).tolist()
        total = torch.zeros_like(means[0])
        # One bin after the other: another machine's torch may add in another order.
        for mean, weight in zip(means, weights, strict=True):
            total += mean * weight
        return total


_ATTRIBUTES = {"token_absmax_second_moment": "token_absmax_second_moments"}
_NAMES = {attribute: name for name, attribute in _ATTRIBUTES.items()}
