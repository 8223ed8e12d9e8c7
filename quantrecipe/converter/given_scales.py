"""Scales that are chosen for a whole weight at once, before the first of its codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantrecipe.formats import get_format
from quantrecipe.formats.two_level import choose_two_levels, effective_scales
from quantrecipe.schema.lock import Role
from quantrecipe.schema.schemes import AnyScaledWeight


@dataclass(frozen=True, slots=True)
class GivenScales:
    """The scales of a weight.

    Attributes:
        decoding: the grid that codes are decoded with; ``[1, 1]`` for granularity ``tensor``.
        encoding: the grid that codes are chosen by, where it is another one.
        stored: what is stored of them, by role.
    """

    decoding: Tensor
    encoding: Tensor | None
    stored: Mapping[Role, Tensor]

    @classmethod
    def of(cls, maxima: Sequence[Tensor], weight: AnyScaledWeight) -> GivenScales:
        """Chosen from what ``BlockTransform.absmax`` says of all blocks, in their order.

        Raises:
            ScaleOutOfRange: as ``WeightFormat.scales``.
        """
        if not weight.has_two_levels:
            scale = get_format(weight).scales(torch.stack([*maxima]).amax(0), weight)
            return cls(scale, None, {"weight_scale": scale})
        two_levels, encoding = choose_two_levels(torch.cat([*maxima]), weight)
        stored: dict[Role, Tensor] = {
            "weight_scale": two_levels.scale,
            "second_scale": two_levels.second,
        }
        if two_levels.offset is not None:
            stored["scale_offset"] = two_levels.offset
        return cls(effective_scales(two_levels, weight), encoding, stored)

    @property
    def offset(self) -> Tensor | None:
        """What is added to scales that are stored less their mean, float32 ``[1]``."""
        return self.stored.get("scale_offset")

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """The scales that some rows are decoded with, and those that their codes are chosen by."""
        if self.decoding.shape == (1, 1):
            return self.decoding, self.encoding
        encoding = None if self.encoding is None else self.encoding[start:stop]
        return self.decoding[start:stop], encoding
