"""Drawing: Euler steps along the guided velocity, from noise at time 0 to an image at time 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from denoiser.data import CHANNELS, IMAGE_TOKENS, Prompt, text_features, to_images
from denoiser.network import conditional_velocity, unconditional_velocity

STEPS = 20
GUIDANCE = 2.0


@dataclass(frozen=True)
class Branches:
    """The two networks that draw together."""

    conditional: nn.Module
    unconditional: nn.Module


class Watcher(Protocol):
    """Told of each step: its number, the latents ``[N, 16, 4]`` it starts from, the time."""

    def __call__(self, step: int, latents: Tensor, time: float) -> None: ...


@torch.no_grad()
def draw(
    branches: Branches,
    prompts: tuple[Prompt, ...],
    *,
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    watcher: Watcher | None = None,
) -> Tensor:
    """One image for each prompt, float32 ``[N, 64]`` from -1 to 1, the same for the same seed."""
    features = text_features(prompts)
    latents = noise(len(prompts), seed)
    for step in range(steps):
        time = step / steps
        if watcher is not None:
            watcher(step, latents, time)
        latents = latents + guided(branches, latents, time, features, guidance) / steps
    return to_images(latents).clamp(-1, 1)


def noise(count: int, seed: int) -> Tensor:
    """Where drawing starts: float32 ``[count, 16, 4]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, IMAGE_TOKENS, CHANNELS, generator=generator)


@torch.no_grad()
def guided(
    branches: Branches, latents: Tensor, time: float, features: Tensor, guidance: float
) -> Tensor:
    """The velocity that is followed: away from the unconditional one, past the conditional."""
    times = torch.full((len(latents),), time)
    toward = conditional_velocity(branches.conditional, latents, times, features)
    away = unconditional_velocity(branches.unconditional, latents, times)
    return guidance * toward + (1 - guidance) * away
