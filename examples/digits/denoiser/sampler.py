"""Drawing: Euler steps along the guided velocity, from noise at time 0 to an image at time 1."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from denoiser.data import CHANNELS, IMAGE_TOKENS, Prompt, text_features, to_images
from denoiser.network import PARTS, conditional_velocity, load_branch, unconditional_velocity

STEPS = 16
GUIDANCE = 2.0
GROUP = 30
"""Prompts that go through a network together. Fixed, so that no result depends on the machine's
cores: products of other shapes may round otherwise."""


@dataclass(frozen=True)
class Branches:
    """The two networks that draw together, and the threads that run them; ``None``: this one."""

    conditional: nn.Module
    unconditional: nn.Module
    threads: Executor | None = None

    @classmethod
    def load(
        cls, read: Callable[[str], nn.Module] = load_branch, threads: Executor | None = None
    ) -> Branches:
        """Both, each from its name."""
        return cls(**{part: read(part) for part in PARTS}, threads=threads)

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


def look(branches: Branches, latents: Tensor, time: float, features: Tensor) -> Step:
    """Ask both branches for their velocity at a time, with text features ``[N, 4, F]``."""

    @torch.no_grad()
    def with_text(start: int) -> Tensor:
        some = latents[start : start + GROUP]
        times = torch.full((len(some),), time)
        given = features[start : start + GROUP]
        return conditional_velocity(branches.conditional, some, times, given)

    @torch.no_grad()
    def without(start: int) -> Tensor:
        some = latents[start : start + GROUP]
        return unconditional_velocity(branches.unconditional, some, torch.full((len(some),), time))

    each = map if branches.threads is None else branches.threads.map
    starts = range(0, len(latents), GROUP)
    conditional, unconditional = each(with_text, starts), each(without, starts)
    return Step(time, latents, torch.cat([*conditional]), torch.cat([*unconditional]))


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
