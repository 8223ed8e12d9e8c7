from __future__ import annotations

import json
from pathlib import Path

import curve
import ideogram4_source as source
import pytest

from quantrecipe.converter import plan


@pytest.mark.parametrize("size", [0.01e9, 0.1e9, *(size * 1e9 for size in curve.SIZES)])
def test_shape_comes_near_the_size(size: float) -> None:
    shape = curve.shape_for(size)
    dimensions = source.Dimensions.scaled(shape.scale, shape.layers)
    written = shape.branches * source.branch_bytes(dimensions)
    assert written == pytest.approx(size, rel=0.2)
    if shape.scale == 1.0:
        assert written == pytest.approx(shape.source_bytes, rel=1e-4)


def test_largest_size_is_the_whole_model() -> None:
    assert curve.shape_for(curve.SIZES[-1] * 1e9) == curve.Shape(2, 34)


@pytest.mark.parametrize("branches", [1, 2])
def test_cut_recipe_takes_what_is_there(tmp_path: Path, branches: int) -> None:
    shape = curve.Shape(branches, layers=2, scale=0.01)
    dimensions = source.Dimensions.scaled(shape.scale, shape.layers)
    for seed, branch in enumerate(source.BRANCHES[:branches]):
        source.write_branch(tmp_path / branch / source.FILE_NAME, dimensions, seed)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(curve.cut(json.loads(curve.RECIPE.read_text()), shape)))
    planned = plan(recipe, tmp_path)
    assert len({module.part for module in planned.modules}) == branches
