"""Checkpoints of other programs, small ones of ours in their layouts, and what both hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantrecipe.converter import convert
from quantrecipe.schema.validation import parse_recipe

Json = dict[str, Any]
Tensors = dict[str, Tensor]

GOLDEN = Path(__file__).resolve().parents[1] / "foreign" / "golden"


def expected(name: str) -> Tensors:
    """What the program that wrote a golden file dequantizes its weights to, by module."""
    found: Tensors = load_file(GOLDEN / f"{name}.expected.safetensors")
    return found


def source() -> Tensors:
    """The bfloat16 weights that the golden files were made from."""
    found: Tensors = load_file(GOLDEN / "source.safetensors")
    return found


def with_config(name: str, folder: Path) -> Path:
    """A golden file as a folder with its ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / f"{name}.safetensors", folder / "model.safetensors")
    shutil.copy(GOLDEN / f"{name}.config.json", folder / "config.json")
    return folder


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits."""
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return False
    # As bytes: the sign of zeros counts, and some dtypes cannot be compared.
    return torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (found, wanted)))


def awkward(rows: int, columns: int, seed: int = 0) -> Tensor:
    """float32 ``[rows, columns]``: outliers, ties, a row and a group of zeros where there is room.

    Every number is one of bfloat16, and so of what any peer computes in.
    """
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator) * 0.05
    made[0, columns // 2] = -7.0
    if rows > 3:
        made[1] = 0.0
        made[2, : columns // 2] = 0.0
        made[3] = (torch.arange(columns) % 16 - 7.5) / 4
        made[-1] *= 2.0**-40
    return made.bfloat16().float()


def written(
    folder: Path,
    layout: str | Json,
    scheme: Json,
    weights: Mapping[str, Tensor],
    *,
    target: Json | None = None,
    **fields: Any,
) -> tuple[Path, Tensors]:
    """A conversion of float32 weights with the streaming converter.

    Args:
        folder: receives ``source.safetensors`` and the folder ``out``.
        layout: the target's.
        scheme: what every module is quantized by.
        weights: by tensor name.
        target: more of the recipe's ``target``.
        fields: of the recipe, in place of its own.

    Returns:
        The file that was written, and its tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: each.contiguous() for name, each in weights.items()}, folder / "source.safetensors"
    )
    recipe = {
        "kind": "recipe",
        "version": 1,
        "name": "small",
        "source": {"layout": "plain"},
        "schemes": {"all": scheme},
        "rules": [{"modules": ["**"], "scheme": "all"}],
        "target": {"layout": layout, "file": "model.safetensors", **(target or {})},
        **fields,
    }
    convert(parse_recipe(json.dumps(recipe), "test"), folder / "source.safetensors", folder / "out")
    path = next((folder / "out").glob("model*"))
    return path, (load_file(path) if path.suffix == ".safetensors" else {})


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
        return found
