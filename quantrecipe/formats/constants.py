"""Tensors that say the same of every module: what is in them, and what is read of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.double_quantization import dynamic_map
from quantrecipe.formats.nf4 import LEVELS

_MEANS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "zeros": "it is not all zeros: the weight has zero points, or rows in another order",
        "code_map": "its codes stand for other numbers than those of nf4",
        "scale_map": "its 8-bit scales stand for other numbers than those of bitsandbytes",
    }
)
CONSTANTS: Final = frozenset(_MEANS)
"""The roles of such tensors."""


def constant(role: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor of one of the roles in ``CONSTANTS``."""
    if role == "code_map":
        return torch.tensor(LEVELS)
    if role == "scale_map":
        return dynamic_map()
    return torch.zeros(shape, dtype=dtype)


def contradicts(role: str, stored: Tensor) -> str | None:
    """What a tensor says that is not so of this format, or ``None``.

    Maps may differ in their last places: programs have computed theirs in more than one way.
    """
    wanted = constant(role, tuple(stored.shape), stored.dtype)
    alike = torch.allclose(stored.double(), wanted.double(), rtol=1e-5, atol=1e-7)
    return None if alike else _MEANS[role]
