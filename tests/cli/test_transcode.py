"""``convert --target-layout`` as a user meets it: what it says, how it exits, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from quantrecipe.cli.convert import convert
from quantrecipe.evaluate import verify
from tests.converter.making import Json, numbers, save, small, tree
from tests.converter.transcoding import made, read_json


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a source in layout comfyui, where the command runs."""
    monkeypatch.chdir(tmp_path)
    made("comfyui", tmp_path / "made", ["int8_channel", "int8_tensor"])
    (tmp_path / "made" / "comfyui").rename(tmp_path / "source")
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(convert, arguments)


def code_of(result: Result) -> int:
    """How the command ends; problems are exceptions that the console script reports."""
    return getattr(result.exception, "exit_code", result.exit_code)


def test_it_says_what_it_inferred_and_saves_it(here: Path) -> None:
    result = run("--target-layout", "quantrecipe", "source", "--out", "out")
    assert code_of(result) == 0
    lines = result.stderr.splitlines()
    assert lines[0] == (
        "the source is in layout comfyui (recipe.lock.json holds the recipe 'made' that it was "
        "made by)"
    )
    assert lines[1] == (
        "inferred recipe source-quantrecipe; it is saved with the result, as recipe.json"
    )
    assert "  int8-channel: int8 channel: 1 module, layers.*.int8_channel" in lines
    assert "requantized" not in result.stderr
    assert "source-quantrecipe: " in result.stdout
    saved = read_json(here / "out/recipe.json")
    assert saved["source"] == {"layout": "comfyui", "parts": {"model": "model.safetensors"}}
    assert saved["target"] == {"layout": "quantrecipe", "file": "model.safetensors"}
    assert not verify(here / "out", against=here / "source").problems
    # The recipe gives the same bytes again.
    again = run("--recipe", "out/recipe.json", "source", "--out", "again")
    assert code_of(again) == 0
    assert tree(here / "again") == tree(here / "out")


def test_a_dry_run_shows_recipe_and_plan_and_writes_nothing(here: Path) -> None:
    before = tree(here)
    result = run("--target-layout", "fp8-scaled", "source", "--dry-run")
    assert code_of(result) == 0
    recipe, _, plan = result.stdout.partition("\n\n")
    assert json.loads(recipe)["name"] == "source-fp8-scaled"
    assert "Quantized: 2 modules, requantized" in plan
    assert "numbers: 1 lossless, 2 requantized" in plan
    assert "not lossless: 2 modules of 3 are requantized (" in plan
    assert tree(here) == before
    as_json = json.loads(
        run("--target-layout", "fp8-scaled", "source", "--dry-run", "--json").stdout
    )
    assert as_json["inferred_recipe"] == json.loads(recipe)
    assert as_json["transfers"] == {"lossless": 1, "requantized": 2}
    assert {each["name"]: each["transfer"] for each in as_json["modules"]} == {
        "layers.0.int8_channel": "requantized",
        "layers.0.int8_tensor": "requantized",
        "layers.0.plain": "lossless",
    }


def test_a_plan_explains_what_is_inverted(tmp_path: Path) -> None:
    source = made("comfyui", tmp_path, ["nvfp4"])
    result = run("--target-layout", "compressed-tensors", str(source), "--dry-run")
    assert "nvfp4 group 16, inverted, scheme nvfp4-group-16" in result.stdout
    assert "numbers: 1 lossless, 1 inverted" in result.stdout
    assert "  inverted: the same codes and scales; the one scale over all" in result.stdout


def test_json_alone_goes_to_stdout(here: Path) -> None:
    result = run("--target-layout", "fp8-scaled", "source", "--out", "out", "--json")
    assert (code_of(result), result.stderr) == (0, "")
    assert json.loads(result.stdout)["transfers"] == {"lossless": 1, "requantized": 2}


def test_what_is_rounded_twice_is_said_in_one_line(here: Path) -> None:
    result = run("--target-layout", "fp8-scaled", "source", "--out", "out")
    (line,) = [each for each in result.stderr.splitlines() if "requantized" in each]
    assert line.startswith("not lossless: 2 modules of 3 are requantized (")


def test_only_what_is_lossless(here: Path) -> None:
    arguments = ["--target-layout", "fp8-scaled", "source", "--out", "out", "--lossless-only"]
    result = run(*arguments)
    assert code_of(result) == 1
    assert "is requantized: codes from numbers that were codes before" in str(result.exception)
    assert not (here / "out").exists()
    as_json = json.loads(run(*arguments, "--json").stdout)
    assert {each["kind"] for each in as_json["problems"]} == {"not-lossless"}
    kept = run("--target-layout", "quantrecipe", "source", "--out", "out", "--lossless-only")
    assert code_of(kept) == 0
    # It holds for a recipe too.
    recipe: Json = read_json(here / "out/recipe.json")
    recipe["schemes"]["int8-channel"]["weight"] = {
        "format": "float8_e4m3fn",
        "granularity": "channel",
    }
    (here / "r.json").write_text(json.dumps(recipe))
    assert code_of(run("--recipe", "r.json", "source", "--out", "o", "--lossless-only")) == 1


@pytest.mark.parametrize(
    ("wanted", "weight"),
    [
        ("float8_e5m2", "float8_e5m2 channel"),
        ("float8_e4m3fn:tensor", "float8_e4m3fn tensor"),
        ("float32", "float32"),
    ],
)
def test_a_format_of_ones_own_choice(here: Path, wanted: str, weight: str) -> None:
    result = run(
        "--target-layout", "fp8-scaled", "--format", wanted, "source", "--dry-run", "--json"
    )
    (module,) = [
        each
        for each in json.loads(result.stdout)["modules"]
        if each["name"].endswith("int8_channel")
    ]
    found = module["weight"]
    assert weight.split() == [found["format"], *([found["granularity"]] if " " in weight else [])]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["in", "--out", "o"], "Missing option '--recipe' (or --target-layout"),
        (["--target-layout", "torchao", "--out", "o"], "Missing argument 'SOURCE'"),
        (
            ["--target-layout", "torchao", "--recipe", "r.json", "in", "--out", "o"],
            "--recipe and --target-layout: a recipe says its target's layout itself",
        ),
        (
            ["--recipe", "r.json", "in", "--out", "o", "--requantize"],
            "--requantize goes with --target-layout",
        ),
        (["--target-layout", "torchao", "in"], "Missing option '--out' (or --dry-run"),
        (
            ["--target-layout", "gguf", "in", "--out", "o", "--format", "q8"],
            "no format is called 'q8'. Did you mean 'q8_0'?",
        ),
        (
            ["--target-layout", "gguf", "in", "--out", "o", "--format", "int8:row"],
            "'int8:row'. Give FORMAT, FORMAT:GRANULARITY (tensor, channel, group, block)",
        ),
        (
            ["--target-layout", "gguf", "in", "--out", "o", "--format", "int8:channel:3"],
            "only groups have a size",
        ),
        (
            ["--target-layout", "gguf", "in", "--out", "o", "--part", "x"],
            "--part 'x': give NAME=LOCATION",
        ),
    ],
)
def test_usage_exits_with_2(here: Path, arguments: list[str], says: str) -> None:
    before = tree(here)
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert tree(here) == before


def test_a_source_that_nothing_explains_exits_with_1(here: Path) -> None:
    save(here / "odd/m.safetensors", {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)})
    result = run("--target-layout", "torchao", "odd", "--out", "o")
    assert code_of(result) == 1
    assert "[a.weight]: float8_e4m3fn weight without its scale" in str(result.exception)


def test_a_plain_source_is_carried_over_as_it_is(here: Path) -> None:
    small(here / "plain/m.safetensors")
    result = run("--target-layout", "quantrecipe", "plain", "--out", "o", "--lossless-only")
    assert code_of(result) == 0
    assert read_json(here / "o/recipe.json")["rules"] == []


def test_layout_and_parts_may_be_said(here: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": torch.from_numpy(rng.integers(-127, 128, (8, 16), dtype=np.int8)),
        "a.weight_scale": torch.from_numpy(rng.random((8, 1)) + 0.5).float(),
        "b.weight": numbers(rng, 8, 16).bfloat16(),
    }
    for name in ("x", "y"):
        save(here / f"two/{name}.safetensors", tensors)
    result = run(
        "--target-layout", "transformerlab", "two", "--out", "o", "--layout", "vllm-omni",
        "--part", "one=x.safetensors", "--part", "two=y.safetensors",
    )  # fmt: skip
    assert code_of(result) == 0
    assert "the source is in layout vllm-omni (as --layout says)" in result.stderr
    saved = read_json(here / "o/recipe.json")
    assert saved["source"]["parts"] == {"one": "x.safetensors", "two": "y.safetensors"}
    assert saved["rules"][0]["modules"] == ["a"]
    assert not verify(here / "o", against=here / "two").problems
