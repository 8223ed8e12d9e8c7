"""``inspect`` knows what the files of other programs are, finds no fault with them, drafts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quantrecipe.checkpoint import open_parts
from quantrecipe.cli.inspect import inspect
from quantrecipe.schema.planning import make_plan
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.recipe import Recipe

GOLDEN = Path(__file__).with_name("golden")
FILES = sorted(
    path.name
    for path in GOLDEN.iterdir()
    if path.suffix in (".safetensors", ".gguf") and ".expected." not in path.name
)
UNREAD_TYPES = ("gguf-mxfp4.gguf", "gguf-q4.gguf", "gguf-q5.gguf")
OTHERS_WAY = "sdnq-int8-matmul.safetensors"
"""Stored in a way that is not read of every module."""

ONLY_NAMED = {"compressed-tensors-int8": "int8-scaled", "compressed-tensors-fp8": "fp8-scaled"}
"""What those are taken for that nothing but a ``config.json`` tells from others."""

STORED: dict[str, str] = {
    "bitsandbytes-int8": "llm_int8 channel",
    "bitsandbytes-nf4": "nf4 block 64",
    "bitsandbytes-nf4-nested": "nf4 block 64, two levels",
    "comfyui-fp8-e4m3": "float8_e4m3fn tensor",
    "comfyui-fp8-e5m2": "float8_e5m2 tensor",
    "comfyui-int8-convrot": "int8 channel",
    "comfyui-int8-row": "int8 channel",
    "comfyui-int8-tensor": "int8 tensor",
    "comfyui-mxfp8": "mxfp8 group 32",
    "comfyui-nvfp4": "nvfp4 group 16, two levels",
    "compressed-tensors-fp8-block": "float8_e4m3fn block 128x128",
    "compressed-tensors-fp8-channel": "float8_e4m3fn channel",
    "compressed-tensors-fp8-tensor": "float8_e4m3fn tensor",
    "compressed-tensors-int4": "int4 group 128",
    "compressed-tensors-int4-zeros": "int4 group 128 with zero points",
    "compressed-tensors-int8": "int8 channel",
    "compressed-tensors-int8-float32-scale": "int8 channel",
    "compressed-tensors-mxfp4": "mxfp4 group 32",
    "compressed-tensors-mxfp8": "mxfp8 group 32",
    "compressed-tensors-nvfp4": "nvfp4 group 16, two levels",
    "compressed-tensors-nvfp4-activations": "nvfp4 group 16, two levels",
    "gguf-q8_0": "q8_0 block 32",
    "sdnq-int8": "int8 channel",
    "sdnq-int8-groups": "int8 group 32",
    "torchao-fp8-weight-only": "float8_e4m3fn channel",
    "torchao-int8-w8a8": "int8 channel",
    "torchao-int8-weight-only": "int8 channel",
    "torchao-nvfp4-weight-only": "nvfp4 group 16, two levels",
}


def placed(tmp_path: Path, file: str, *, configured: bool) -> Path:
    """A folder with the checkpoint, and its ``config.json`` if it is to have it."""
    folder = tmp_path / "model"
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / file, folder / f"model{Path(file).suffix}")
    config = GOLDEN / f"{Path(file).stem}.config.json"
    if configured:
        shutil.copy(config, folder / "config.json")
    return folder


def cases(*, readable: bool = True) -> list[Any]:
    found = []
    for file in FILES:
        if readable and file in (*UNREAD_TYPES, OTHERS_WAY):
            continue
        found.append(pytest.param(file, False, id=file))
        if (GOLDEN / f"{Path(file).stem}.config.json").exists():
            found.append(pytest.param(file, True, id=f"{file} with config"))
    return found


def facts(folder: Path) -> dict[str, Any]:
    result = CliRunner().invoke(inspect, [str(folder), "--json"])
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (1 if found["problems"] else 0)
    return found


def layout_of(file: str, *, configured: bool) -> str:
    stem = Path(file).stem
    if file == "source.safetensors":
        return "plain"
    if file.endswith(".gguf"):
        return "gguf-one-part"
    for beginning, neutral in ONLY_NAMED.items():
        if stem.startswith(beginning) and not configured:
            return neutral
    return next(
        name
        for name in ("bitsandbytes", "comfyui", "compressed-tensors", "sdnq", "torchao")
        if stem.startswith(name)
    )


@pytest.mark.parametrize(("file", "configured"), cases())
def test_the_files_of_others_are_known_and_nothing_is_wrong_with_them(
    tmp_path: Path, file: str, configured: bool
) -> None:
    found = facts(placed(tmp_path, file, configured=configured))
    assert found["problems"] == []
    (part,) = found["parts"]
    assert part["layout"] == layout_of(file, configured=configured)
    assert part["foreign"] is None
    wanted = STORED.get(Path(file).stem)
    if wanted is not None:
        stored = {f"{g['format']} {g['granularity']}" for g in part["modules"] if g["granularity"]}
        assert wanted in stored
    alike = any("would take it for the same numbers" in note for note in found["notes"])
    assert alike == (part["layout"] in ("int8-scaled", "fp8-scaled"))


def test_what_of_them_is_not_read_is_told_and_no_fault(tmp_path: Path) -> None:
    found = facts(placed(tmp_path, "bitsandbytes-nf4.safetensors", configured=False))
    (problem,) = found["not_read"]
    assert problem["kind"] == "blocks-over-rows"
    assert problem["tensor"].startswith("layers.0.feed_forward.w2")
    assert "layers.0.feed_forward.w2" in found["notes"][0]


@pytest.mark.parametrize("configured", [False, True])
def test_weights_that_are_stored_turned_round_are_told_one_by_one(
    tmp_path: Path, configured: bool
) -> None:
    found = facts(placed(tmp_path, OTHERS_WAY, configured=configured))
    (part,), (problem,) = found["parts"], found["not_read"]
    assert (part["layout"], part["foreign"], found["problems"]) == ("sdnq", None, [])
    assert (problem["kind"], problem["tensor"]) == (
        "transposed-weight",
        "layers.0.attention.o.weight",
    )
    assert found["totals"]["quantized"] == 2


@pytest.mark.parametrize("file", UNREAD_TYPES)
def test_types_of_gguf_that_are_not_read_are_named(tmp_path: Path, file: str) -> None:
    result = CliRunner().invoke(inspect, [str(placed(tmp_path, file, configured=False)), "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert {problem["kind"] for problem in found["problems"]} == {"unsupported-dtype"}
    assert all("is stored as" in problem["message"] for problem in found["problems"])


def test_rotation_of_comfyui_is_shown(tmp_path: Path) -> None:
    found = facts(placed(tmp_path, "comfyui-int8-convrot.safetensors", configured=False))
    rotations = {g["pattern"]: g["rotation"] for g in found["parts"][0]["modules"]}
    assert rotations == {
        "head": None,
        "layers.0.attention.o": 64,
        "layers.0.feed_forward.w1": 256,
        "layers.0.feed_forward.w2": None,
    }


@pytest.mark.parametrize(("file", "configured"), cases())
def test_a_draft_for_each_plans_without_error(tmp_path: Path, file: str, configured: bool) -> None:
    folder = placed(tmp_path, file, configured=configured)
    partly = facts(folder)["not_read"]
    arguments = [str(folder), "--emit-recipe"]
    if partly:
        with pytest.raises(InvalidInput) as caught:
            CliRunner().invoke(inspect, arguments, catch_exceptions=False)
        assert {each.kind for each in caught.value.problems} == {each["kind"] for each in partly}
        return
    recipe = Recipe.model_validate_json(
        CliRunner().invoke(inspect, arguments, catch_exceptions=False).stdout
    )
    assert recipe.source.layout == layout_of(file, configured=configured)
    planned = make_plan(recipe, open_parts(folder, recipe.source.parts))
    assert {warning.kind for warning in planned.warnings} <= {"input-scale-dropped"}
    assert all(module.disposition != "passthrough" for module in planned.modules)
    kept = [m for m in planned.modules if m.disposition == "quantized" and m.scheme != "w8a8"]
    assert all(module.carried for module in kept)
    assert (recipe.target.layout == "quantrecipe") == bool(kept)
