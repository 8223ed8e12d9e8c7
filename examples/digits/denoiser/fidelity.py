"""How far a quantized pair of branches is from the pair it was made of, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from denoiser.data import Prompt, text_features
from denoiser.sampler import Branches, Step, look
from quantrecipe.evaluate.scores.bootstrap import (
    RESAMPLES,
    Values,
    percentile_interval,
    times_drawn,
)

LEVEL = 0.95


def velocity_sqnr(
    branches: Branches, reference: Sequence[Step], prompts: tuple[Prompt, ...]
) -> Values:
    """Signal to noise of the guided velocity, at the states that the reference went through.

    Returns:
        Decibels ``[N]``: the power of the reference's velocity over that of the difference, each
        summed over the steps.
    """
    features = text_features(prompts)
    signal = torch.zeros(len(prompts), dtype=torch.float64)
    noise = torch.zeros_like(signal)
    for step in reference:
        seen = look(branches, step.latents, step.time, features)
        signal += _power(step.velocity)
        noise += _power(seen.velocity - step.velocity)
    return (10 * torch.log10(signal / noise)).numpy()


def image_psnr(images: Tensor, reference: Tensor) -> Values:
    """Peak signal to noise of images ``[N, 64]`` from -1 to 1: decibels ``[N]``."""
    mean = (images - reference).double().square().mean(1)
    return (10 * torch.log10(4 / mean)).numpy()


def _power(values: Tensor) -> Tensor:
    return values.double().square().sum((1, 2))


def interval(values: Values, seed: int = 0) -> tuple[float, float, float]:
    """A mean over prompts, and the percentile bootstrap's interval for it.

    Give the differences of two variants on the same prompts for a paired interval.

    Returns:
        The mean, and the ends of its 95 % interval.
    """
    means = _drawn(len(values), seed) @ values / len(values)
    return float(values.mean()), *percentile_interval(means, LEVEL)


@cache
def _drawn(count: int, seed: int) -> Values:
    """The same draws for everything that is compared."""
    return times_drawn(count, RESAMPLES, seed)
