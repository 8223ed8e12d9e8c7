"""What the tests of converters, loaders and ``convert`` share: sources, recipes, layouts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.statistics import STATISTICS_KEY
from quantrecipe.schema.validation import parse_recipe
from quantrecipe.testing.strategies import (
    BLOCK_SIZE,
    GROUP_SIZE,
    SCALE_DTYPES,
    layout_of_everything,
)

Json = dict[str, Any]
Tensors = dict[str, Tensor]

PLAIN_DTYPES = ("float64", "float32", "float16", "bfloat16")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


def everything() -> Json:
    """A layout that holds every format in every granularity, with small blocks."""
    document: Json = layout_of_everything().to_json_value()
    return document


def weight_spec(fmt: str, granularity: str = "channel", scale_dtype: str = "float32") -> Json:
    spec: Json = {"format": fmt, "granularity": granularity, "scale_dtype": scale_dtype}
    if granularity == "group":
        spec["group_size"] = GROUP_SIZE
    if granularity == "block":
        spec["block_size"] = list(BLOCK_SIZE)
    return spec


WEIGHTS: dict[str, Json] = {
    f"{fmt}-{granularity}-{scale_dtype}": weight_spec(fmt, granularity, scale_dtype)
    for fmt, granularities in {
        "int8": ("tensor", "channel", "group"),
        **dict.fromkeys(FLOAT8, ("tensor", "channel", "block")),
    }.items()
    for granularity in granularities
    for scale_dtype in SCALE_DTYPES
}
"""Every way of storing a weight with scales."""


@dataclass(frozen=True)
class Kind:
    """A way in which a source may hold a weight: a dtype, and the shape and dtype of scales."""

    dtype: str
    scale: str | None = None
    scale_dtype: str = "float32"

    def build(self, rng: np.random.Generator, rows: int, columns: int) -> Tensors:
        """``weight`` and, with scales, ``weight_scale``; finite, with zeros and outliers."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        if self.scale is None:
            return {"weight": numbers(rng, rows, columns).to(dtype)}
        codes = rng.integers(-128, 128, (rows, columns), dtype=np.int8)
        weight = torch.from_numpy(codes).view(dtype)
        if self.dtype != "int8":
            weight = torch.where(weight.double().isfinite(), weight.float(), 1.5).to(dtype)
        shape: dict[str, tuple[int, ...]] = {
            "[]": (),
            "[1]": (1,),
            "[out]": (rows,),
            "[out,1]": (rows, 1),
            "block": (-(-rows // BLOCK_SIZE[0]), -(-columns // BLOCK_SIZE[1])),
            "group": (rows, columns // GROUP_SIZE),
        }
        scale = 2.0 ** rng.uniform(-7, 1, shape[self.scale])
        return {
            "weight": weight,
            "weight_scale": torch.tensor(scale).to(getattr(torch, self.scale_dtype)),
        }

    def meaning(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight that ``build`` made, in float64."""
        weight = tensors["weight"].double()
        if self.scale is None:
            return weight
        rows, columns = weight.shape
        group = {
            "block": BLOCK_SIZE,
            "group": (1, GROUP_SIZE),
            "[out]": (1, columns),
            "[out,1]": (1, columns),
        }.get(self.scale, (rows, columns))
        return weight * spread(tensors["weight_scale"], (rows, columns), group)


KINDS: dict[str, Kind] = {
    **{dtype: Kind(dtype) for dtype in PLAIN_DTYPES},
    **{
        f"{dtype}-{shape}": Kind(dtype, shape)
        for dtype in FLOAT8
        for shape in ("[]", "[1]", "[out]", "[out,1]", "block")
    },
    **{f"int8-{shape}": Kind("int8", shape) for shape in ("[]", "[out]", "[out,1]", "group")},
    "float8_e4m3fn-bfloat16": Kind("float8_e4m3fn", "[out]", "bfloat16"),
    "int8-float16": Kind("int8", "[out,1]", "float16"),
}
"""Every way in which a source may hold a weight."""


def numbers(rng: np.random.Generator, rows: int, columns: int) -> Tensor:
    """Weights, float64: a few rows of zeros, rows of different sizes, a few outliers."""
    sizes = 2.0 ** rng.uniform(-6, 4, (rows, 1)) * rng.choice([0, 1], (rows, 1), p=[0.1, 0.9])
    values = rng.standard_normal((rows, columns)) * sizes
    values[rng.random((rows, columns)) < 0.02] *= 30
    return torch.from_numpy(values)


def spread(scale: Tensor, shape: tuple[int, ...], group: tuple[int, int]) -> Tensor:
    """The scale of each element of a weight, float64, whatever shape the scales are stored in."""
    rows, columns = shape
    grid = scale.double().reshape(-(-rows // group[0]), -(-columns // group[1]))
    grid = grid.repeat_interleave(group[0], 0)[:rows]
    return grid.repeat_interleave(group[1], 1)[:, :columns]


def group_of(spec: Json, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, columns = shape
    return {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, spec.get("group_size", 0)),
        "block": tuple(spec.get("block_size", (0, 0))),
    }[spec["granularity"]]


def recipe(
    weight: Json | None = None,
    *,
    source: Json | str = "plain",
    target: Json | str = "int8-scaled",
    target_fields: Json | None = None,
    **fields: Any,
) -> Json:
    """A recipe that quantizes every module the same way; ``fields`` replace its own."""
    scheme = {"weight": weight if weight is not None else weight_spec("int8")}
    return {
        "kind": "recipe",
        "version": 1,
        "name": "small",
        "source": {"layout": source},
        "schemes": {"all": scheme},
        "rules": [{"modules": ["**"], "scheme": "all"}],
        "target": {"layout": target, **(target_fields or {})},
        **fields,
    }


def parsed(document: Json) -> Recipe:
    return parse_recipe(json.dumps(document), "test")


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def save_statistics(
    path: Path, part: str, maxima: Mapping[str, Tensor], more: Mapping[str, Tensor] | None = None
) -> Path:
    """A statistics file: module to input maxima, float32 ``[bins, in]``; ``more`` by full names."""
    header = {
        "kind": "statistics",
        "version": 1,
        "model": "small",
        "samples": 1,
        "timesteps": [
            {"start": float(index), "stop": float(index + 1), "samples": 1}
            for index in range(next(iter(maxima.values())).shape[0])
        ],
        "modules": {part: sorted(maxima)},
    }
    tensors = {f"{part}/{module}/input_absmax": tensor for module, tensor in maxima.items()}
    return save(path, {**tensors, **(more or {})}, {STATISTICS_KEY: json.dumps(header)})


def small(path: Path, seed: int = 0, part: Callable[[str], str] = str) -> Tensors:
    """A small bfloat16 checkpoint: two linears, one with a bias, and a norm."""
    rng = np.random.default_rng(seed)
    tensors = {
        part("a.weight"): numbers(rng, 8, 12).bfloat16(),
        part("a.bias"): torch.from_numpy(rng.standard_normal(8)).bfloat16(),
        part("b.weight"): numbers(rng, 5, 8).bfloat16(),
        part("norm.weight"): torch.from_numpy(rng.standard_normal(8)).bfloat16(),
    }
    save(path, tensors, {"format": "pt"})
    return tensors


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by its path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_lock(folder: Path) -> Json:
    lock: Json = json.loads((folder / "recipe.lock.json").read_text("utf-8"))
    return lock


def result_of(folder: Path) -> tuple[dict[str, str], Json]:
    """All that two conversions must agree on: every file, and the lock but for who did it."""
    lock = read_lock(folder)
    del lock["converter"], lock["sha256"]
    return {path: sha for path, sha in tree(folder).items() if path != "recipe.lock.json"}, lock


def raw(tensor: Tensor) -> bytes:
    data: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data
