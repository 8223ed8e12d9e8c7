"""A small model in which some linears are fragile on purpose, and what calibration says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantrecipe.converter.calibration import ModuleStatistics, write_statistics
from quantrecipe.loaders import load_model
from quantrecipe.schema.validation import load_statistics_header
from tests.converter.making import Json, save, weight_spec

WIDTH, LAYERS, TOKENS = 48, 12, 96
FRAGILE = (2, 5, 9)
TOKEN: Json = {"format": "int8", "granularity": "token", "dynamic": True}


class Planted(nn.Module):
    """Twelve residual linears; the inputs of three have one channel that dwarfs all others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.gains = nn.Parameter(torch.ones(LAYERS, WIDTH))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for index, layer in enumerate(self.layers):
                assert isinstance(layer, nn.Linear)
                layer.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) * WIDTH**-0.5)
                if index in FRAGILE:
                    self.gains[index, index] = 200
                    layer.weight[:, index] /= 200

    def inputs(self, index: int, state: Tensor) -> Tensor:
        """What a linear is given."""
        normed = state * state.square().mean(1, keepdim=True).rsqrt()
        return normed * self.gains[index].to(state.dtype)

    def forward(self, state: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            state = state + 0.5 * layer(self.inputs(index, state))
        return state


def tokens() -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def observed(inputs: Tensor, bins: Sequence[int] | None = None, keep: int = 0) -> ModuleStatistics:
    """What calibration says of these inputs, float32 ``[tokens, in]``; the first are kept."""
    sizes = [len(inputs)] if bins is None else list(bins)
    pieces = torch.split(inputs, sizes)
    numbers = [piece.double() for piece in pieces]
    found = ModuleStatistics(
        input_absmax=torch.stack([piece.abs().amax(0) for piece in pieces]),
        input_second_moment=torch.stack([piece.square().mean(0) for piece in numbers]),
        input_moments=torch.stack(
            [torch.stack([(piece**power).mean() for power in (1, 2, 3, 4)]) for piece in numbers]
        ),
        tokens=torch.tensor(sizes),
        token_absmax_second_moments=torch.stack(
            [piece.abs().amax(1).square().mean() for piece in numbers]
        ),
    )
    if not keep:
        return found
    at = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    # Spread over the bins.
    kept = torch.arange(0, len(inputs), max(1, len(inputs) // keep))[:keep]
    return ModuleStatistics.from_tensors(
        found.tensors()
        | {
            "input_tokens": inputs[kept],
            "input_token_bins": at[kept],
            "input_token_keys": torch.arange(len(kept)),
        }
    )


def save_observed(
    path: Path,
    modules: Mapping[tuple[str, str], ModuleStatistics],
    siblings: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> Path:
    """A statistics file of these modules."""
    names: dict[str, list[str]] = {}
    for part, name in modules:
        names.setdefault(part, []).append(name)
    one = next(iter(modules.values()))
    header: Json = {
        "kind": "statistics",
        "version": 1,
        "model": "planted",
        "samples": 1,
        "timesteps": [
            {"start": index, "stop": index + 1, "samples": 1}
            for index in range(len(one.input_absmax))
        ],
        "modules": names,
        "reservoir": 0 if one.input_tokens is None else len(one.input_tokens),
    }
    if siblings:
        header["siblings"] = {part: [*map(list, found)] for part, found in siblings.items()}
    write_statistics(path, load_statistics_header(json.dumps(header)), modules)
    return path


def recipe(**fields: Any) -> Json:
    """A recipe that quantizes all linears to W8A8; ``fields`` replace its own."""
    return {
        "kind": "recipe",
        "version": 1,
        "name": "planted",
        "source": {"layout": "plain"},
        "schemes": {"w8a8": {"weight": weight_spec("int8"), "activation": TOKEN}},
        "rules": [{"modules": ["layers.*"], "scheme": "w8a8", "count": LAYERS}],
        "target": {"layout": "quantrecipe"},
        **fields,
    }


def write_planted(folder: Path, keep: int = 0) -> None:
    """``m.safetensors`` and ``s.safetensors``: the model, and what was measured of it."""
    model, state = Planted(), tokens()
    save(folder / "m.safetensors", {name: p.detach() for name, p in model.named_parameters()})
    modules = {}
    with torch.no_grad():
        for index, layer in enumerate(model.layers):
            inputs = model.inputs(index, state)
            modules["model", f"layers.{index}"] = observed(inputs, keep=keep)
            state = state + 0.5 * layer(inputs)
    save_observed(folder / "s.safetensors", modules)


def damage(folder: Path) -> float:
    """The mean squared error of a converted model's outputs, as a ladder's function."""
    converted = Planted()
    load_model(converted, folder, dtype=torch.float32, kernel="reference")
    with torch.no_grad():
        wanted = Planted()(tokens())
        return float((converted(tokens()) - wanted).square().mean())
