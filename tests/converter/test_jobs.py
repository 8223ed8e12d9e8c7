"""The same bytes from any number of threads, compiled or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantrecipe.converter import convert, working
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.recipe import Recipe

WEIGHTS: dict[str, dict[str, Any]] = {
    "int8-channel": {"format": "int8", "granularity": "channel"},
    "int8-tensor": {"format": "int8", "granularity": "tensor", "scale_dtype": "bfloat16"},
    "int8-group": {"format": "int8", "granularity": "group", "group_size": 16},
    "fp8-channel": {"format": "float8_e4m3fn", "granularity": "channel"},
    "fp8-block": {"format": "float8_e5m2", "granularity": "block", "block_size": [128, 128]},
}


def recipe(weight: dict[str, Any]) -> Recipe:
    document = {
        "kind": "recipe",
        "version": 1,
        "name": "jobs",
        "source": {"layout": "plain"},
        "schemes": {"s": {"weight": weight}},
        "rules": [{"modules": ["**"], "scheme": "s"}],
        "target": {"layout": "int8-scaled" if weight["format"] == "int8" else "fp8-scaled"},
    }
    return Recipe.model_validate_json(json.dumps(document))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"layers.{index}.w.weight": torch.randn(130 + index, 160, generator=generator).bfloat16()
        for index in range(6)
    }
    save_file(tensors | {"norm.weight": torch.ones(160)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_the_same_bytes_from_any_number_of_threads(
    weight: dict[str, Any], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = set()
    for number, (jobs, pays_from) in enumerate(((1, 1 << 60), (2, 1 << 60), (1, 0), (4, 0))):
        monkeypatch.setattr(working, "COMPILED_PAYS_FROM_BYTES", pays_from)
        out = tmp_path / f"out{number}"
        done = convert(recipe(weight), source, out, jobs=jobs, block_bytes=20_000)
        locks.add((done.lock.outputs[0].sha256, (out / "recipe.lock.json").read_bytes()))
    assert len(locks) == 1


@pytest.mark.parametrize("pays_from", [0, 1 << 60], ids=["compiled", "plain"])
def test_the_first_bad_module_is_named_whoever_meets_it(
    pays_from: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working, "COMPILED_PAYS_FROM_BYTES", pays_from)
    tensors = {f"layers.{index}.w.weight": torch.ones(64, 64) for index in range(8)}
    tensors["layers.2.w.weight"][40, 7] = float("nan")
    tensors["layers.5.w.weight"][0, 0] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors")
    for jobs in (1, 4):
        with pytest.raises(InvalidInput) as caught:
            convert(
                recipe(WEIGHTS["int8-channel"]),
                tmp_path / "model.safetensors",
                tmp_path / "out",
                jobs=jobs,
                block_bytes=1000,
            )
        (problem,) = caught.value.problems
        assert problem.tensor == "layers.2.w.weight"
        assert "[40, 7]" in problem.message
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_no_jobs_is_an_error_of_the_caller(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 jobs"):
        convert(recipe(WEIGHTS["int8-channel"]), source, tmp_path / "out", jobs=0)
