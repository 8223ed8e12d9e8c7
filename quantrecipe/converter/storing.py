"""What a module is stored as beside codes and scales: what follows from its plan alone."""

from __future__ import annotations

import torch
from torch import Tensor

from quantrecipe.formats.constants import constant
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.schema.lock import Role
from quantrecipe.schema.markers import marker_bytes
from quantrecipe.schema.plan import PlannedModule


def written_anew(module: PlannedModule, role: Role, offset: Tensor | None) -> Tensor:
    """A tensor of one of the roles in ``WRITTEN_ANEW``.

    Args:
        module: whose.
        role: which.
        offset: what is added to its scales, float32 ``[1]``, if they are stored less their mean.
    """
    output = module.outputs[role]
    if role == "weight_shape":
        return torch.tensor([module.source.out_features, module.source.in_features])
    if role == "marker":
        assert module.marker is not None
        number = None if offset is None else float(offset)
        text = marker_bytes(module.marker, module.marker_length, number)
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return constant(role, output.shape, TORCH_DTYPES[output.dtype])
