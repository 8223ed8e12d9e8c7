"""Branches of Ideogram 4 that are not INT8: what takes the place of ``load`` in ``usage.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from _ideogram4_repository import FP8, PARTS, WEIGHTS
from safetensors import safe_open
from torch import Tensor, nn

from quantrecipe.loaders import load_model, without_weights


def in_bfloat16(
    component: Any, folder: Path, device: torch.device, dtype: torch.dtype, loader: None
) -> nn.Module:
    """Weights multiplied out."""
    model, path = empty(component, folder)
    state: dict[str, Tensor] = {}
    with safe_open(path, "pt", device=str(device)) as file:
        for name in file.keys():  # noqa: SIM118 - it has no iterator
            tensor = file.get_tensor(name)
            if tensor.dtype == FP8:
                tensor = tensor.float() * file.get_tensor(f"{name}_scale")[:, None]
            if not name.endswith("_scale"):
                state[name] = tensor.to(dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).eval()


def in_fp8(
    component: Any, folder: Path, device: torch.device, dtype: torch.dtype, loader: None
) -> nn.Module:
    """Codes and scales of the source, as ``load_model`` computes with them."""
    model, path = empty(component, folder)
    load_model(model, path, layout="fp8-scaled", device=device, dtype=dtype)
    # The pipeline casts inputs to the dtype of the first weight, and here that is one of codes.
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"dtype": dtype})
    return model.eval()


def cast_by_layer(
    component: Any, folder: Path, device: torch.device, dtype: torch.dtype, loader: None
) -> nn.Module:
    """Weights rounded to FP8 without scales, which diffusers casts back before each layer."""
    model: Any = in_bfloat16(component, folder, device, dtype, loader)
    model.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=dtype)
    return model  # type: ignore[no-any-return]


def empty(component: Any, folder: Path) -> tuple[nn.Module, Path]:
    """A branch without weights, and the file that has them."""
    config = json.loads((folder / component["config"]).read_text("utf-8"))
    with without_weights():
        model = getattr(diffusers, component["class_name"]).from_config(config)
    return model, folder / PARTS[component["part"]] / WEIGHTS


LOADERS: Final[dict[str, Callable[..., nn.Module]]] = {
    "bfloat16": in_bfloat16,
    "fp8": in_fp8,
    "layerwise": cast_by_layer,
}
