"""int8 by rows between all layouts that hold it, with projections split and merged on the way."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from quantrecipe.converter import convert
from tests.converter.making import numbers, parsed, save
from tests.converter.transcoding import FORMATS, ROW_WISE, over, recipe_for, tensor_bytes

MERGED = [{"from": [f"layers.*.{each}" for each in "qkv"], "into": "layers.*.qkv"}]
SPLIT = [{"from": "layers.*.qkv", "into": [f"layers.*.{each}" for each in "qkv"]}]


def qkv(layout: str, folder: Path) -> Path:
    """A checkpoint in a layout: int8 by rows, with one projection for queries, keys and values."""
    rng = np.random.default_rng(3)
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        tensors[f"layers.{layer}.qkv.weight"] = numbers(rng, 48, 32).bfloat16()
        tensors[f"layers.{layer}.qkv.bias"] = torch.from_numpy(rng.standard_normal(48)).float()
        tensors[f"layers.{layer}.o.weight"] = numbers(rng, 32, 16).bfloat16()
    save(folder / "plain" / "model.safetensors", tensors)
    document = recipe_for("plain", {"int8_channel": {"weight": FORMATS["int8_channel"]}}, layout)
    document["rules"] = [{"modules": ["layers.*.{qkv,o}"], "scheme": "int8_channel"}]
    convert(parsed(document), folder / "plain", folder / layout, jobs=1)
    return folder / layout


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fused")
    names = folder / "names"
    names.mkdir()
    for name, entries in (("merged", MERGED), ("split", SPLIT)):
        document = {"kind": "names", "version": 1, "name": name, "names": entries}
        (names / f"{name}.json").write_text(json.dumps(document))
    return {"names": names} | {layout: qkv(layout, folder / layout) for layout in ROW_WISE}


@pytest.mark.parametrize("pair", [*itertools.permutations(ROW_WISE, 2)], ids="-to-".join)
def test_rows_are_split_and_merged_on_the_way(
    pair: tuple[str, str], fused: dict[str, Path], tmp_path: Path
) -> None:
    one, other = pair
    planned = over(fused[one], other, tmp_path / "there", names=str(fused["names"] / "split.json"))
    assert {module.transfer for module in planned.modules} == {"lossless"}
    assert {module.name.rpartition(".")[2] for module in planned.modules} == set("qkvo")
    back = over(
        tmp_path / "there", one, tmp_path / "back", names=str(fused["names"] / "merged.json")
    )
    assert {module.transfer for module in back.modules} == {"lossless"}
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(fused[one])
