"""A small model that is to be smoothed: its weights, what was measured of it, and recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.converter.making import KINDS, Json, everything, recipe, save, save_statistics

CHANNELS: Final = 40


class Model:
    """A small model in a folder: modules with their numbers, and what was measured of them."""

    def __init__(self, folder: Path, seed: int, modules: Mapping[str, tuple[str, int]]) -> None:
        rng = np.random.default_rng(seed)
        self.folder = folder
        self.weights: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for name, (kind, rows) in modules.items():
            built = KINDS[kind].build(rng, rows, CHANNELS)
            self.weights[name] = KINDS[kind].meaning(built).float()
            tensors |= {f"{name}.{role}": tensor for role, tensor in built.items()}
            maxima = torch.from_numpy(rng.lognormal(0, 2, (2, CHANNELS))).float()
            maxima[:, rng.random(CHANNELS) < 0.1] = 0
            self.inputs[name] = maxima
        self.source = save(folder / "m.safetensors", tensors)
        save_statistics(folder / "s.safetensors", "model", self.inputs)

    def keep_tokens(self, tokens: Mapping[str, Tensor]) -> None:
        """Add tokens to the statistics file; of other modules it keeps none."""
        kept = {name: torch.zeros(0, CHANNELS) for name in self.inputs} | dict(tokens)
        more: dict[str, Tensor] = {}
        for name, each in kept.items():
            prefix = f"model/{name}/input_token"
            bins = torch.zeros(len(each), dtype=torch.int64)
            more |= {f"{prefix}s": each, f"{prefix}_bins": bins}
            more[f"{prefix}_keys"] = torch.arange(len(each))
        self._rewrite(more, {"reservoir": max(1, *map(len, kept.values()))})

    def add(self, measured: Mapping[str, Tensor]) -> None:
        """Add what else was measured to the statistics file."""
        self._rewrite({f"model/{name}": each for name, each in measured.items()}, {})

    def find_siblings(self, *groups: Sequence[str]) -> None:
        """Have the statistics file name siblings."""
        self._rewrite({}, {"siblings": {"model": groups}})

    def _rewrite(self, more: Mapping[str, Tensor], fields: Json) -> None:
        path = self.folder / "s.safetensors"
        tensors = load_file(path)
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        ((key, header),) = json.loads(content[8 : 8 + size])["__metadata__"].items()
        said = json.dumps(json.loads(header) | fields)
        save(path, tensors | dict(more), {key: said})

    def recipe(self, weight: Json, alpha: Any = 0.5, **fields: Any) -> Path:
        """The path of a recipe that smooths everything; fields of a scheme go into that."""
        smoothing = {"kind": "smoothquant", "alpha": alpha, "apply": "online"}
        smoothing |= {"statistics": "s.safetensors"}
        if "power_of_two" in fields:
            smoothing["power_of_two"] = fields.pop("power_of_two")
        scheme = {"weight": weight, "smoothing": smoothing}
        if "activation" in fields:
            scheme["activation"] = fields.pop("activation")
        document = recipe(
            source=everything(), target=everything(), schemes={"all": scheme}, **fields
        )
        path = self.folder / "recipe.json"
        path.write_text(json.dumps(document))
        return path
