"""The benchmark of the whole pipeline: what it makes is what the recipe is for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from quantrecipe.converter import convert
from quantrecipe.schema.registry import recipe_text
from quantrecipe.schema.validation import parse_recipe
from tests.loaders.converted import library

pytestmark = pytest.mark.xdist_group("diffusers")


def test_the_recipe_of_all_layers_is_the_built_in_one() -> None:
    library("diffusers")
    from ideogram4_pipeline import LAYERS, RECIPE, recipe

    expected = json.loads(recipe_text(RECIPE))
    expected["target"]["emit_loader"] = True
    assert recipe(LAYERS) == expected


def test_a_small_repository_is_converted_and_has_its_programs(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries
        library("diffusers")
        from _ideogram4_repository import TOY, publish, write_repository
        from ideogram4_pipeline import recipe

        with torch.no_grad():
            write_repository(tmp_path / "base", TOY, torch.device("cpu"))
    document = parse_recipe(json.dumps(recipe(TOY.layers)), "the recipe")
    out = convert(document, tmp_path / "base", tmp_path / "int8")
    kinds = {
        module.name.rpartition(".")[2]: module.disposition
        for module in out.lock.modules
        if module.name.startswith("layers.1.")
    }
    assert set(kinds.values()) == {"quantized", "protected"}
    assert kinds["w1"] == kinds["to_q"] == "quantized"
    publish(out.out, tmp_path / "base")
    for name in ("usage.py", "download_deps.py", "safetensors_loader.py"):
        compile((out.out / name).read_text("utf-8"), name, "exec")
