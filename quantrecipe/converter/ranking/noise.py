"""The noise of a quantized linear's output in closed form, from moments of its inputs.

A linear computes ``y = x W^T``. Quantized, it computes ``(x + dx) (W + dW)^T``. Rounding errors are
taken as unrelated to each other and to what was rounded, so that the mean power of the error of a
token's outputs, all of them together, is ::

    sum_j  E[x_j^2] D_j  +  v_j S_j  +  v_j D_j        D_j = sum_n dW_nj^2,  S_j = sum_n W_nj^2

and that of the outputs themselves ``sum_j E[x_j^2] S_j``, where ``v_j`` is the mean square of
``dx_j``. Both weights are there to be measured, so ``D_j`` holds for every format. For int8 by row
and token this is ``(s_w^2 |x|^2 + s_x^2 |w|^2) / 12 + K s_x^2 s_w^2 / 144``, summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantrecipe.converter.activations import prepared
from quantrecipe.converter.calibration import ModuleStatistics
from quantrecipe.schema.schemes import DynamicActivation

_E4M3_RELATIVE: Final = 0.75 / torch.log(torch.tensor(4.0)).item() / 12 / 2**6
"""Mean of ``dx^2 / x^2`` of a float with three bits of mantissa, if mantissas are log-uniform.

The step is ``2^(e - 3)`` for ``2^e <= abs(x) < 2^(e + 1)``, the mean of ``(2^e / x)^2`` is
``(1 - 1/4) / (2 ln 2)``, and an error uniform within a step has the mean square ``step^2 / 12``.
"""

_E4M3_FLOOR: Final = 2.0**-18 / 12
"""The same of subnormals, in squares of the scale: their step is ``2^-9``."""

_LARGEST: Final = {"int8": 127.0, "float8_e4m3fn": 448.0}


@dataclass(frozen=True, slots=True)
class WeightColumns:
    """A weight and its error, by input channel; smoothed, where it is.

    Attributes:
        signal: ``S_j``, float64 ``[in]``.
        noise: ``D_j``, float64 ``[in]``; of the rotated weight, where it is rotated.
        rotated: ``S_j`` of the rotated weight; ``None`` where it is not.
    """

    signal: Tensor
    noise: Tensor
    rotated: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Powers:
    """Mean squares of a token's outputs, added up over the outputs, for each timestep bin.

    Attributes:
        weights: the share of each bin in all tokens, float64 ``[B]``; the shares add up to 1.
        signal: float64 ``[B]``.
        noise: float64 ``[B]``.
    """

    weights: Tensor
    signal: Tensor
    noise: Tensor

    def ratio(self) -> float:
        """Noise to signal over all tokens."""
        return ratio(
            float((self.weights * self.noise).sum()), float((self.weights * self.signal).sum())
        )

    def worst(self) -> tuple[int, float]:
        """The bin with tokens whose ratio is largest, and that ratio."""
        ratios = [
            ratio(float(noise), float(signal)) if float(weight) > 0 else -1.0
            for weight, signal, noise in zip(self.weights, self.signal, self.noise, strict=True)
        ]
        index = max(range(len(ratios)), key=ratios.__getitem__)
        return index, ratios[index]


def ratio(noise: float, signal: float) -> float:
    """Noise to signal; 0 where there is no signal that could be disturbed."""
    return noise / signal if signal > 0 else 0.0


def token_shares(inputs: ModuleStatistics) -> Tensor:
    """The share of each timestep bin in all tokens, float64 ``[B]``; equal ones if unknown."""
    bins = inputs.input_absmax.shape[0]
    if inputs.tokens is None or not bool(inputs.tokens.any()):
        return torch.full((bins,), 1 / bins, dtype=torch.float64)
    return inputs.tokens.double() / inputs.tokens.sum()


def predicted(
    inputs: ModuleStatistics,
    columns: WeightColumns,
    activation: DynamicActivation | None,
    factors: Tensor | None = None,
    rotation: int | None = None,
) -> Powers | None:
    """The powers that a linear's output will have, for each timestep bin.

    Args:
        inputs: before smoothing.
        columns: of the weight as it is quantized: after smoothing.
        activation: how inputs are quantized; ``None``: they are not.
        factors: what inputs are divided by, float32 ``[in]``.
        rotation: the columns in a block of the rotation; ``None``: there is none.

    Returns:
        ``None`` if second moments were not measured.
    """
    if inputs.input_second_moment is None:
        return None
    moments = inputs.input_second_moment
    if factors is not None:
        moments = moments / factors.double().square()
    power, weight = moments @ columns.signal, columns.signal
    if rotation is not None:
        assert columns.rotated is not None
        # Unrelated channels of a block: each of the rotated ones is the mean of all of them.
        blocks = moments.view(len(moments), -1, rotation)
        moments = blocks.mean(2, keepdim=True).expand_as(blocks).reshape(moments.shape)
        weight = columns.rotated
    noise = moments @ columns.noise
    if activation is not None:
        rounding = rounding_noise(inputs, moments, activation, factors, rotation)
        noise = noise + rounding @ (weight + columns.noise)
    return Powers(token_shares(inputs), power, noise)


def rounding_noise(
    inputs: ModuleStatistics,
    moments: Tensor,
    activation: DynamicActivation,
    factors: Tensor | None,
    rotation: int | None = None,
) -> Tensor:
    """``v_j`` of each bin, float64 ``[B, in]``.

    An error is never larger than what it is the error of: a channel much smaller than a step is
    rounded to zeros, and its noise is its own power. Without that, one spike in a token would count
    as noise in every channel of it. A token's largest input is a code itself and has no error.
    Where errors are relative that counts: its power is left out, alike in all channels.

    Args:
        inputs: before smoothing.
        moments: ``E[x_j^2]`` after smoothing and rotation.
        activation: how inputs are quantized.
        factors: what inputs are divided by.
        rotation: the columns in a block of the rotation.
    """
    if rotation is None:
        largest = largest_squares(inputs, activation, factors)[:, None]
    else:
        largest = largest_rotated(inputs, moments, activation, factors, rotation)[:, None]
    scale = largest / _LARGEST[activation.format] ** 2
    if activation.format == "int8":
        return torch.minimum(moments, scale / 12)
    relative = _E4M3_RELATIVE * moments
    if activation.granularity == "token":
        relative = relative * (1 - largest / moments.sum(1, keepdim=True)).clamp(0, 1).nan_to_num(0)
    return torch.minimum(moments, relative + _E4M3_FLOOR * scale)


def largest_squares(
    inputs: ModuleStatistics, activation: DynamicActivation, factors: Tensor | None
) -> Tensor:
    """The mean square of the largest input that shares a scale, float64 ``[B]``.

    Statistics have it for tokens before smoothing. Smoothed, it is taken to change as it does on
    the tokens that were kept or, without any, as the square of the largest input of all does.
    Where it was not measured, that square stands for it: it is as large at most.
    """
    before = inputs.input_absmax.double().amax(1).square()
    after = before
    if factors is not None:
        after = (inputs.input_absmax / factors).double().amax(1).square()
    measured = inputs.token_absmax_second_moments
    if activation.granularity == "tensor" or measured is None:
        return after
    if factors is None:
        return measured
    kept = inputs.tokens_kept()
    if kept is not None and bool(kept.any()):
        largest = kept.abs().amax(1).double().square().mean()
        smoothed = (kept / factors).abs().amax(1).double().square().mean()
        return measured * (smoothed / largest)
    return measured * torch.where(before > 0, after / before, torch.ones_like(before))


def largest_rotated(
    inputs: ModuleStatistics,
    moments: Tensor,
    activation: DynamicActivation,
    factors: Tensor | None,
    rotation: int,
) -> Tensor:
    """``largest_squares`` of rotated inputs, float64 ``[B]``.

    Without tokens that were kept, rotated inputs are taken as normally distributed, for they are
    sums of many: the largest square of ``n`` is about ``2 ln n`` times their mean square.

    Args:
        inputs: before smoothing.
        moments: ``E[x_j^2]`` after smoothing and rotation.
        activation: how inputs are quantized.
        factors: what inputs are divided by.
        rotation: the columns in a block of the rotation.
    """
    bins = len(moments)
    kept, count = inputs.tokens_kept(), moments.shape[1]
    if kept is not None and len(kept):
        squares = prepared(kept, factors, rotation).abs().amax(1).double().square()
        largest = squares.mean() if activation.granularity == "token" else squares.amax()
        return largest.expand(bins)
    if activation.granularity == "tensor" and inputs.tokens is not None:
        count = count * max(1, int(inputs.tokens.sum()))
    return moments.amax(1) * (2 * math.log(max(2, count)))
