"""A sample of tokens that does not depend on their order, nor on who saw which.

Every token gets a key, a hash of what it holds and of its bin, and the tokens with the smallest
keys are kept. Equal tokens have equal keys and are kept once, so that padding does not fill it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Self

import numpy as np
import torch
from torch import Tensor

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MIX_1: Final = 0xBF58476D1CE4E5B9
_MIX_2: Final = 0x94D049BB133111EB
"""The constants of SplitMix64."""


@dataclass(frozen=True, slots=True, eq=False)
class Reservoir:
    """The tokens with the smallest keys; all tensors are on one device.

    Attributes:
        limit: the most tokens that are kept.
        keys: int64 ``[k]``, ascending, each once.
        bins: the timestep bin of each, int64 ``[k]``.
        tokens: bfloat16 or float32 ``[k, I]``, exactly what was handed in.
    """

    limit: int
    keys: Tensor
    bins: Tensor
    tokens: Tensor

    @classmethod
    def empty(cls, limit: int, channels: int, device: torch.device) -> Self:
        """Without tokens."""
        numbers = torch.empty(0, dtype=torch.int64, device=device)
        tokens = torch.empty(0, channels, dtype=torch.bfloat16, device=device)
        return cls(limit, numbers, numbers, tokens)

    @classmethod
    def of(cls, limit: int, tokens: Tensor, keys: Tensor, at: int) -> Self:
        """Of tokens ``[n, I]`` of the bin ``at``, with their keys ``[n]``."""
        chosen = _smallest(keys, limit)
        exact = tokens if tokens.dtype == torch.bfloat16 else tokens.float()
        bins = torch.full_like(chosen, at)
        return cls(limit, keys[chosen], bins, exact[chosen])

    def merged(self, other: Reservoir) -> Reservoir:
        """The tokens that are kept of both together, on the device of this one."""
        other = other.to(self.keys.device)
        keys = torch.cat([self.keys, other.keys])
        chosen = _smallest(keys, self.limit)
        bins = torch.cat([self.bins, other.bins])[chosen]
        tokens = torch.cat([self.tokens, other.tokens])[chosen]
        return Reservoir(self.limit, keys[chosen], bins, tokens)

    def to(self, device: torch.device) -> Reservoir:
        """On another device."""
        keys, bins, tokens = self.keys.to(device), self.bins.to(device), self.tokens.to(device)
        return Reservoir(self.limit, keys, bins, tokens)


def _smallest(keys: Tensor, limit: int) -> Tensor:
    """Where the smallest keys are, ascending, each once: int64 ``[k]`` with ``k <= limit``."""
    ordered, order = keys.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return order[first][:limit]


def token_keys(rows: Tensor, at: int) -> Tensor:
    """The keys of tokens: the same on every device, whatever dtype they came in.

    Args:
        rows: float32 ``[n, I]``.
        at: their bin.

    Returns:
        int64 ``[n]``.
    """
    # -0 and 0 are the same number.
    bits = (rows + 0.0).view(torch.int32).long()
    # In bfloat16's floats the lower half is empty; sums modulo 2^64 would lose the upper half.
    bits ^= bits >> 16
    bits *= _multipliers(rows.shape[1], rows.device)
    return _mixed(bits.sum(1) + _signed((at + 1) * _GOLDEN))


def _mixed(keys: Tensor) -> Tensor:
    """SplitMix64's last steps: every bit of a key depends on every bit of what it is made of."""
    keys = (keys ^ _shifted(keys, 30)) * _signed(_MIX_1)
    keys = (keys ^ _shifted(keys, 27)) * _signed(_MIX_2)
    return keys ^ _shifted(keys, 31)


def _shifted(keys: Tensor, by: int) -> Tensor:
    """To the right, with zeros coming in."""
    return (keys >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The signed 64-bit number of the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


@lru_cache(maxsize=64)
def _multipliers(channels: int, device: torch.device) -> Tensor:
    """An odd number for each channel, by SplitMix64: int64 ``[I]``."""
    with np.errstate(over="ignore"):
        state = np.arange(1, channels + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_1)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX_2)
    odd = (state ^ (state >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(odd.view(np.int64)).to(device)
