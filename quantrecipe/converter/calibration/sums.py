"""What is summed up over the tokens that a module is handed; memory does not grow with them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Final, Self

import torch
from torch import Tensor

from quantrecipe.converter.calibration.module import ModuleStatistics
from quantrecipe.converter.calibration.reservoir import Reservoir, token_keys
from quantrecipe.schema.statistics import HISTOGRAM_BINS, token_absmax_edges

_CPU_ELEMENTS: Final = 1 << 17
_OTHER_ELEMENTS: Final = 1 << 23
"""How many numbers are looked at together: on a CPU, as many as its caches hold."""


@dataclass(slots=True, eq=False)
class Sums:
    """Sums over tokens, for each timestep bin; all tensors are on one device.

    Attributes:
        absmax: of each channel, float32 ``[B, I]``.
        squares: the sum of ``x^2`` of each channel, float64 ``[B, I]``.
        powers: the sums of ``x``, ``x^2``, ``x^3``, ``x^4`` over all numbers, float64 ``[B, 4]``.
        tokens: how many there were, int64 ``[B]``.
        histogram: of the largest absolute values of tokens, int64 ``[B, 256]``.
        token_squares: the sum of their squares, float64 ``[B]``.
    """

    absmax: Tensor
    squares: Tensor
    powers: Tensor
    tokens: Tensor
    histogram: Tensor
    token_squares: Tensor

    @classmethod
    def zeros(cls, bins: int, channels: int, device: torch.device) -> Self:
        """Of no token."""
        return cls(
            absmax=torch.zeros(bins, channels, device=device),
            squares=torch.zeros(bins, channels, device=device, dtype=torch.float64),
            powers=torch.zeros(bins, 4, device=device, dtype=torch.float64),
            tokens=torch.zeros(bins, device=device, dtype=torch.int64),
            histogram=torch.zeros(bins, HISTOGRAM_BINS, device=device, dtype=torch.int64),
            token_squares=torch.zeros(bins, device=device, dtype=torch.float64),
        )

    @property
    def channels(self) -> int:
        """Input features."""
        return self.absmax.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The attributes by name; all but ``absmax`` are sums."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def to(self, device: torch.device) -> Sums:
        """On another device."""
        return Sums(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def row(self, at: int) -> Sums:
        """Those of one bin; changes go through."""
        return Sums(**{name: tensor[at : at + 1] for name, tensor in self.tensors().items()})

    def add(self, other: Sums) -> None:
        """Sum up what is in both, here."""
        torch.maximum(self.absmax, other.absmax, out=self.absmax)
        for name, tensor in other.tensors().items():
            if name != "absmax":
                getattr(self, name).add_(tensor)

    def look_at(self, rows: Tensor) -> None:
        """Sum up a few tokens, float32 ``[n, I]`` on the same device; there is one bin."""
        magnitudes = rows.abs()
        largest = magnitudes.amax(1)
        index = torch.bucketize(largest, _edges(rows.device), right=True)
        # The fourth power of a float32 is finite in float64, and so is the sum of many.
        exact = rows.double()
        squares = exact * exact
        by_channel = squares.sum(0)
        flat, flat_squares = exact.reshape(-1), squares.reshape(-1)
        powers = [
            exact.sum(),
            by_channel.sum(),
            torch.dot(flat_squares, flat),
            torch.dot(flat_squares, flat_squares),
        ]
        torch.maximum(self.absmax[0], magnitudes.amax(0), out=self.absmax[0])
        self.squares[0] += by_channel
        self.powers[0] += torch.stack(powers)
        self.tokens += len(rows)
        self.histogram[0].index_add_(0, index, torch.ones_like(index))
        self.token_squares += largest.double().square().sum()


@dataclass(slots=True, eq=False)
class ModuleSums:
    """What is summed up of a module.

    Attributes:
        sums: over its tokens.
        kept: the tokens that are kept; ``None``: none are.
        called: whether it was called, be it with no token.
    """

    sums: Sums
    kept: Reservoir | None
    called: bool = False

    @classmethod
    def zeros(cls, bins: int, channels: int, reservoir: int, device: torch.device) -> Self:
        """Of a module that was not called yet."""
        kept = Reservoir.empty(reservoir, channels, device) if reservoir else None
        return cls(Sums.zeros(bins, channels, device), kept)

    @classmethod
    def of(cls, tokens: Tensor, at: int, reservoir: int) -> Self:
        """Of tokens ``[n, I]`` of any floating dtype, which are of the bin ``at``; in one bin."""
        found = cls.zeros(1, tokens.shape[1], reservoir, tokens.device)
        found.called = True
        elements = _CPU_ELEMENTS if tokens.device.type == "cpu" else _OTHER_ELEMENTS
        keys = []
        step = max(1, elements // tokens.shape[1])
        for start in range(0, len(tokens), step):
            rows = tokens[start : start + step].float()
            found.sums.look_at(rows)
            if reservoir:
                keys.append(token_keys(rows, at))
        if keys:
            found.kept = Reservoir.of(reservoir, tokens, torch.cat(keys), at)
        return found

    @classmethod
    def from_statistics(cls, measured: ModuleStatistics, reservoir: int) -> Self:
        """Of what a file says, which has to have all of it."""
        absmax, tokens = measured.input_absmax, measured.tokens
        assert tokens is not None
        bins, channels = absmax.shape
        sums = Sums.zeros(bins, channels, absmax.device)
        sums.absmax, sums.tokens = absmax, tokens
        for name, means in (
            ("squares", measured.input_second_moment),
            ("powers", measured.input_moments),
            ("token_squares", measured.token_absmax_second_moments),
            ("histogram", measured.token_absmax_histogram),
        ):
            assert means is not None
            setattr(sums, name, means)
        sums.squares = sums.squares * tokens[:, None]
        sums.powers = sums.powers * (tokens[:, None] * channels)
        sums.token_squares = sums.token_squares * tokens
        kept = None
        if reservoir:
            keys, places = measured.input_token_keys, measured.input_token_bins
            assert keys is not None
            assert places is not None
            assert measured.input_tokens is not None
            kept = Reservoir(reservoir, keys, places, measured.input_tokens)
        return cls(sums, kept, called=bool(tokens.any()))

    def add(self, other: ModuleSums, at: int | None = None) -> None:
        """Sum up what is in both, here.

        Args:
            other: in as many bins, or in one.
            at: where its one bin belongs.
        """
        self.called |= other.called
        device = other.sums.absmax.device
        if device != self.sums.absmax.device:
            self.sums = self.sums.to(device)
        (self.sums if at is None else self.sums.row(at)).add(other.sums)
        if self.kept is not None and other.kept is not None:
            self.kept = other.kept.merged(self.kept)

    def statistics(self, weight_absmax: Tensor | None) -> ModuleStatistics:
        """What a file says of it, on the CPU: a copy. A mean over no token is 0."""
        sums = self.sums.to(torch.device("cpu"))
        count = sums.tokens.clamp(min=1).double()
        kept = self.kept
        return ModuleStatistics(
            input_absmax=sums.absmax.clone(),
            input_second_moment=sums.squares / count[:, None],
            input_moments=sums.powers / (count[:, None] * sums.channels),
            tokens=sums.tokens.clone(),
            token_absmax_histogram=sums.histogram.clone(),
            token_absmax_second_moments=sums.token_squares / count,
            weight_absmax=weight_absmax,
            input_tokens=None if kept is None else kept.tokens.cpu(),
            input_token_bins=None if kept is None else kept.bins.cpu(),
            input_token_keys=None if kept is None else kept.keys.cpu(),
        )


@lru_cache(maxsize=64)
def _edges(device: torch.device) -> Tensor:
    return torch.tensor(token_absmax_edges(), device=device)
