"""Outlier channels as large models have them, planted into networks too small to grow their own.

What is planted does not change what a network computes, only how hard it is to round:

* **Mild, everywhere.** A few channels of every block linear's input are scaled up by a power of
  two, and the columns that meet them are scaled down by it: in ``attention_norm1`` and its
  ``to_q``, ``to_k``, ``to_v``; in ``to_v`` and its ``to_out``; in ``ffn_norm1`` and its ``w1``,
  ``w3``; in ``w3`` and its ``w2``. SmoothQuant undoes this kind.
* **Spikes, in ``SPIKED`` layers.** The two units of a feed-forward that contribute least give up
  their place to two copies of one that contributes much, scaled up by a large power of two. Their
  columns of ``w2`` are each other's negative and as large as the largest weight of each row, so
  what they add is zero. The token's largest activation is theirs all the same, and the columns
  are no smaller than others: smoothing can share the trouble out, not remove it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

SPIKED: Mapping[str, tuple[int, ...]] = {"conditional": (1, 4, 6), "unconditional": (2, 3, 6)}
"""The layers whose ``feed_forward.w2`` gets spikes: the planted fragile modules."""

MILD_CHANNELS = 4
MILD_NORM_FACTOR = 32.0
MILD_ROW_FACTOR = 16.0
SPIKE_OVER_MEDIAN = 4096.0
SEED = 11


@dataclass(frozen=True)
class Spike:
    """What was planted into one ``w2``: which unit was copied onto which two, scaled by what."""

    module: str
    unit: int
    copies: tuple[int, int]
    factor: float
    removed_share: float
    """Of the sum of squares that ``w2`` gives, what the two units that went had given."""

    def as_json(self) -> dict[str, object]:
        """For the training record."""
        return asdict(self)


@torch.no_grad()
def plant_mild(network: nn.Module) -> None:
    """Scale a few channels of every block linear's input, exactly undone by its columns."""
    random = np.random.default_rng(SEED)
    for layer in network.get_submodule("layers").children():
        weights = dict(layer.named_parameters())
        attention = [weights[f"attention.to_{name}.weight"] for name in "qkv"]
        gate, value = (weights[f"feed_forward.w{number}.weight"] for number in (1, 3))
        pairs = (
            (weights["attention_norm1.weight"], attention, MILD_NORM_FACTOR),
            (attention[2], [weights["attention.to_out.0.weight"]], MILD_ROW_FACTOR),
            (weights["ffn_norm1.weight"], [gate, value], MILD_NORM_FACTOR),
            (value, [weights["feed_forward.w2.weight"]], MILD_ROW_FACTOR),
        )
        for producer, consumers, factor in pairs:
            channels = _some(random, len(producer))
            producer[channels] *= factor
            for consumer in consumers:
                consumer[:, channels] /= factor


def _some(random: np.random.Generator, count: int) -> Tensor:
    chosen: NDArray[np.int64] = random.choice(count, MILD_CHANNELS, replace=False)
    return torch.from_numpy(chosen)


@torch.no_grad()
def plant_spikes(network: nn.Module, part: str, inputs: Mapping[str, Tensor]) -> list[Spike]:
    """Plant pairs that cancel.

    Args:
        network: changed in place.
        part: whose ``SPIKED`` layers are meant.
        inputs: for each of their ``w2``, by name, what it was handed: ``[tokens, units]``.
    """
    spikes = []
    for number in SPIKED[part]:
        module = spiked_module(number)
        given = inputs[module]
        feed_forward = network.get_submodule(module.rpartition(".")[0])
        weights = dict(feed_forward.named_parameters())
        up, down = weights["w3.weight"], weights["w2.weight"]
        contributed = given.square().mean(0) * down.square().sum(0)
        order = contributed.argsort()
        unit, copies = int(order[-1]), order[:2]
        largest = given.abs().amax(0)
        factor = 2.0 ** round(float((SPIKE_OVER_MEDIAN * largest.median() / largest[unit]).log2()))
        removed = float(contributed[copies].sum() / contributed.sum())
        weights["w1.weight"][copies] = weights["w1.weight"][unit].clone()
        up[copies] = factor * up[unit].clone()
        down[:, copies] = 0
        row_largest = down.abs().amax(1)
        down[:, copies[0]], down[:, copies[1]] = row_largest, -row_largest
        pair = (int(copies[0]), int(copies[1]))
        spikes.append(Spike(module, unit, pair, factor, removed))
    return spikes


def spiked_module(layer: int) -> str:
    """The name of a layer's ``w2``."""
    return f"layers.{layer}.feed_forward.w2"
