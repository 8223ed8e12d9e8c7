"""Reading converted checkpoints: tensors by meaning, checked against recipe and lock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantrecipe.loaders.building import without_weights
from quantrecipe.loaders.checkpoint import Checkpoint, OpenPart
from quantrecipe.loaders.linear import QuantizedLinear
from quantrecipe.loaders.loading import load_model
from quantrecipe.loaders.opening import Check, open_checkpoint
from quantrecipe.loaders.protocol import Loader, Names
from quantrecipe.loaders.report import LoadReport
from quantrecipe.loaders.selection import find_loader, loader_names
from quantrecipe.schema.layout import Layout

__all__ = [
    "Checkpoint",
    "LoadReport",
    "Loader",
    "Names",
    "OpenPart",
    "QuantizedLinear",
    "find_loader",
    "load_model",
    "load_state_dict",
    "loader_names",
    "open_checkpoint",
    "without_weights",
]


def load_state_dict(
    path: Path | str,
    *,
    part: str | None = None,
    names: Names = "source",
    dtype: torch.dtype = torch.float32,
    layout: str | Layout | None = None,
    parts: Mapping[str, str] | None = None,
    check: Check = "headers",
    loader: str = "reference",
) -> dict[str, Tensor]:
    """Every tensor of a converted checkpoint, quantized weights as the numbers they stand for.

    Args:
        path: the folder that ``convert`` wrote, or one safetensors file.
        part: which part; ``None``: the only one, or all where ``names`` tells them apart.
        names: keys as the source called things, or as the target does.
        dtype: of the weights that were quantized; every other tensor keeps its own.
        layout: as ``open_checkpoint``.
        parts: as ``open_checkpoint``.
        check: as ``open_checkpoint``.
        loader: who reads it.

    Raises:
        InvalidInput: with every problem found.
    """
    with open_checkpoint(path, layout=layout, parts=parts, check=check) as checkpoint:
        return find_loader(loader, checkpoint).load_state_dict(
            checkpoint, part=part, names=names, dtype=dtype
        )
