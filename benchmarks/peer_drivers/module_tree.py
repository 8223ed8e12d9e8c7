"""The checkpoint as a tree of torch modules, for libraries that quantize models and not files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

LOOKUP_TABLES = ("embed_image_indicator",)


def load(path: Path) -> torch.nn.Module:
    """Build the modules on the meta device and give them the checkpoint's tensors.

    Neither library reads FP8 with scales, so weights stored that way are dequantized here, one at a
    time, to bfloat16.
    """
    state = load_file(path)
    for name in [name for name in state if name.endswith(".weight_scale")]:
        scale = state.pop(name)
        weight = name.removesuffix("_scale")
        state[weight] = (state[weight].float() * scale[:, None]).to(torch.bfloat16)
    model = torch.nn.Module()
    with torch.device("meta"):
        for name, tensor in state.items():
            module, _, parameter = name.rpartition(".")
            if parameter == "weight":
                _place(model, module, _module(module, tensor, f"{module}.bias" in state))
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _module(name: str, weight: torch.Tensor, has_bias: bool) -> torch.nn.Module:
    if weight.ndim == 2 and name not in LOOKUP_TABLES:
        out_features, in_features = weight.shape
        return torch.nn.Linear(in_features, out_features, has_bias, dtype=weight.dtype)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.empty_like(weight), requires_grad=False)
    return module


def _place(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent = model
    *folders, last = name.split(".")
    for folder in folders:
        if not hasattr(parent, folder):
            parent.add_module(folder, torch.nn.Module())
        parent = getattr(parent, folder)
    parent.add_module(last, module)
