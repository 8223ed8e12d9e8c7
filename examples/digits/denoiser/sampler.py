"""Drawing: Euler steps along the guided velocity, from noise at time 0 to an image at time 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from denoiser.data import CHANNELS, IMAGE_TOKENS, Prompt, text_features, to_images
from denoiser.network import PARTS, conditional_velocity, load_branch, unconditional_velocity

STEPS = 16
GUIDANCE = 2.0


@dataclass(frozen=True)
class Branches:
    """The two networks that draw together."""

    conditional: nn.Module
    unconditional: nn.Module

    @classmethod
    def load(cls, read: Callable[[str], nn.Module] = load_branch) -> Branches:
        """Both, each from its name."""
        return cls(**{part: read(part) for part in PARTS})

    def part(self, name: str) -> nn.Module:
        """One of them by its name."""
        return {"conditional": self.conditional, "unconditional": self.unconditional}[name]


@dataclass(frozen=True)
class Step:
    """Where a step starts, and what both branches say there: float32 ``[N, 16, 4]`` each."""

    time: float
    latents: Tensor
    conditional: Tensor
    unconditional: Tensor

    @property
    def velocity(self) -> Tensor:
        """What is followed: past the conditional velocity, away from the unconditional one."""
        return GUIDANCE * self.conditional + (1 - GUIDANCE) * self.unconditional


@torch.no_grad()
def look(branches: Branches, latents: Tensor, time: float, features: Tensor) -> Step:
    """Ask both branches for their velocity at a time, with text features ``[N, 4, F]``."""
    times = torch.full((len(latents),), time)
    return Step(
        time,
        latents,
        conditional_velocity(branches.conditional, latents, times, features),
        unconditional_velocity(branches.unconditional, latents, times),
    )


def trajectory(
    branches: Branches, prompts: tuple[Prompt, ...], *, seed: int, steps: int = STEPS
) -> list[Step]:
    """Every step from noise on, the same for the same seed."""
    features = text_features(prompts)
    latents = noise(len(prompts), seed)
    taken = []
    for number in range(steps):
        step = look(branches, latents, number / steps, features)
        taken.append(step)
        latents = latents + step.velocity / steps
    return taken


def drawn(taken: list[Step]) -> Tensor:
    """The images at the end of a trajectory: float32 ``[N, 64]`` from -1 to 1."""
    last = taken[-1]
    return to_images(last.latents + last.velocity / len(taken)).clamp(-1, 1)


def draw(
    branches: Branches, prompts: tuple[Prompt, ...], *, seed: int, steps: int = STEPS
) -> Tensor:
    """One image for each prompt, float32 ``[N, 64]`` from -1 to 1, the same for the same seed."""
    return drawn(trajectory(branches, prompts, seed=seed, steps=steps))


def noise(count: int, seed: int) -> Tensor:
    """Where drawing starts: float32 ``[count, 16, 4]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, IMAGE_TOKENS, CHANNELS, generator=generator)
