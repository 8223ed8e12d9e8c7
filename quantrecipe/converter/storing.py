"""What a module is stored as beside codes and scales: zero points, and the shape of a weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantrecipe.formats.packing import pack_down
from quantrecipe.schema.packings import Packing
from quantrecipe.schema.plan import PlannedModule


def stored_zero_points(zero_point: Tensor, packings: Mapping[str, Packing]) -> Tensor:
    """A grid of zero points, uint8 in memory, as the target's layout packs it."""
    packing = packings.get("weight_zero_point")
    return zero_point if packing is None else pack_down(zero_point, packing)


def shape_tensor(module: PlannedModule) -> Tensor:
    """Out and in features, int64 ``[2]``."""
    return torch.tensor([module.source.out_features, module.source.in_features])
