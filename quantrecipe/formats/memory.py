"""Tensors as plain memory."""

from __future__ import annotations

import torch
from torch import Tensor


def as_memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.reshape(-1).view(torch.uint8)
    return flat.numpy().data
