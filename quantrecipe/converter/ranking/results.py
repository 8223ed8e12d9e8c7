"""What a ranking finds: how much noise each module makes, and what protecting it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from quantrecipe.schema.dtypes import PlainDType

Key = tuple[str, str]
"""Part and module."""

Basis = Literal["tokens", "moments", "weight"]
"""Where a module's noise comes from: measured on tokens that calibration kept, predicted from the
moments of its inputs, or, where nothing was measured, that of its weight alone."""


def decibels(noise: float) -> float | None:
    """A noise-to-signal ratio as a signal-to-noise ratio in dB; ``None`` without any noise."""
    return -10 * math.log10(noise) if noise > 0 else None


@dataclass(frozen=True, slots=True)
class Spikiness:
    """How far the inputs of a module are from evenly spread.

    Attributes:
        max_to_median: the largest absolute input of any channel to the median channel's; infinite
            if half the channels have no input at all.
        kurtosis: of all inputs, 3 for a normal distribution; ``None`` if it was not measured.
    """

    max_to_median: float
    kurtosis: float | None


@dataclass(frozen=True, slots=True)
class WorstBin:
    """The timestep bin in which a module is noisiest.

    Attributes:
        start, stop: its timesteps, ``[start, stop)``.
        noise: its noise-to-signal ratio there.
    """

    start: float
    stop: float
    noise: float


@dataclass(frozen=True, slots=True)
class Fragility:
    """One module under its scheme. Noise is a ratio of powers: noise to signal.

    Attributes:
        part, name: which.
        scheme: the scheme that the recipe quantizes it by.
        noise: of its output, as well as that is known; what modules are ranked by.
        basis: where ``noise`` comes from.
        weight_noise: of its weight, ``sum (w - w_hat)^2 / sum w^2``, smoothed where it is.
        predicted: of its output, from moments; ``None`` if they were not measured.
        activation_share: the share of ``predicted`` that would stay if weights were exact.
        measured: of its output, on ``tokens`` kept tokens; ``None`` without any.
        tokens: how many there were.
        spikiness: of its inputs; ``None`` if nothing was measured.
        worst_bin: by ``basis``; ``None`` if nothing was measured, or in one bin alone.
        blind: whether its activations are quantized, and ``noise`` does not know what that costs.
        extra_bytes: what the output grows by if it is protected.
    """

    part: str
    name: str
    scheme: str
    noise: float
    basis: Basis
    weight_noise: float
    predicted: float | None
    activation_share: float | None
    measured: float | None
    tokens: int
    spikiness: Spikiness | None
    worst_bin: WorstBin | None
    blind: bool
    extra_bytes: int

    @property
    def key(self) -> Key:
        """Part and module."""
        return self.part, self.name


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that are protected together, or one alone.

    Attributes:
        modules: part and name of each, in order.
        noise: the sum of their noise-to-signal ratios.
        extra_bytes: what the output grows by if they are protected.
    """

    modules: tuple[Key, ...]
    noise: float
    extra_bytes: int

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that it has modules of."""
        return tuple(dict.fromkeys(part for part, _ in self.modules))


@dataclass(frozen=True, slots=True)
class Ranking:
    """Every module that a recipe quantizes, and what belongs together.

    Attributes:
        modules: the noisiest first.
        groups: every module is in one of them; the noisiest first.
        dtype: what a protected module is kept in.
    """

    modules: tuple[Fragility, ...]
    groups: tuple[Group, ...]
    dtype: PlainDType

    @property
    def noise(self) -> float:
        """The sum of all modules' noise-to-signal ratios."""
        return math.fsum(module.noise for module in self.modules)

    def module(self, key: Key) -> Fragility:
        """A module by part and name."""
        return next(module for module in self.modules if module.key == key)
