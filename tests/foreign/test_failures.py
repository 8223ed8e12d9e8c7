"""What goes wrong silently with other programs, and what this one does about each.

Memory that is bounded whatever the size of a tensor: ``tests/converter/test_run.py``,
``test_memory_follows_the_block_and_not_the_tensor``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantrecipe.cli.inspect import inspect
from quantrecipe.converter import convert, plan
from quantrecipe.loaders import load_state_dict
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.validation import parse_recipe

Json = dict[str, Any]
Tensors = dict[str, Tensor]

TOKENS = {"format": "int8", "granularity": "token", "dynamic": True}


def recipe(source: str = "plain", target: str = "int8-scaled", **more: Any) -> Json:
    """int8 W8A8 for everything, unless said otherwise."""
    scheme = {"weight": {"format": "int8", "granularity": "channel"}, "activation": TOKENS}
    return {
        "kind": "recipe",
        "version": 1,
        "name": "failures",
        "source": {"layout": source, "parts": {"model": "."}},
        "schemes": {"w8a8": scheme},
        "rules": [{"modules": ["**"], "scheme": "w8a8"}],
        "target": {"layout": target, "file": "model.safetensors"},
    } | more


def parsed(document: Json) -> Recipe:
    return parse_recipe(json.dumps(document), "recipe.json")


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def refusals(caught: pytest.ExceptionInfo[InvalidInput]) -> list[tuple[str, str | None]]:
    return [(each.kind, each.pointer or each.tensor) for each in caught.value.problems]


def inspected(path: Path) -> Json:
    result = CliRunner().invoke(inspect, [str(path), "--json"])
    found: Json = json.loads(result.stdout)
    assert result.exit_code == (1 if found["problems"] else 0)
    return found


def found_wrong(path: Path) -> list[tuple[str, str | None]]:
    return [(each["kind"], each.get("tensor")) for each in inspected(path)["problems"]]


def marker(**said: Any) -> Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(96, 64), (64, 64)], ids=["oblong", "square"])
def test_fp8_with_scales_of_rows_in_one_dimension_keeps_its_numbers(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    """With convert-to-quant 1.3.4: off by a factor of thousands, exit code 0."""
    weight = numbers(*shape) * torch.logspace(-3, 1, shape[0])[:, None]
    scale = weight.abs().amax(1) / 448
    codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    meant = codes.float() * scale[:, None]
    source = save(tmp_path / "m.safetensors", {"a.weight": codes, "a.weight_scale": scale})
    assert inspected(source)["parts"][0]["layout"] == "fp8-scaled"
    convert(parsed(recipe("fp8-scaled")), source, tmp_path / "out")
    got = load_state_dict(tmp_path / "out")["a.weight"]
    step = meant.abs().amax(1, keepdim=True) / 127
    assert bool(((got - meant).abs() <= step * 0.5001).all())


@pytest.mark.parametrize("entry", ["rules", "protected"])
def test_an_entry_that_matches_nothing_is_refused(tmp_path: Path, entry: str) -> None:
    """With llmcompressor 0.14: an ``ignore`` that matches nothing is accepted."""
    source = save(tmp_path / "m.safetensors", {"layers.0.a.weight": numbers(8, 8)})
    document = recipe()
    idle: Json = {"modules": ["layers.0.typo"]}
    idle |= {"scheme": "w8a8"} if entry == "rules" else {"dtype": "bfloat16", "reason": "fragile"}
    document[entry] = [idle, *document.get(entry, [])]
    with pytest.raises(InvalidInput) as caught:
        plan(parsed(document), source)
    assert refusals(caught) == [("takes-nothing", f"/{entry}/0/modules/0")]


@pytest.mark.parametrize("key", ["rule", "protect", "ignore"])
def test_a_typo_in_a_key_is_refused(key: str) -> None:
    """With llmcompressor 0.14: a typo gives an empty recipe, and nothing is quantized."""
    with pytest.raises(InvalidInput) as caught:
        parsed(recipe() | {key: []})
    assert refusals(caught) == [("unknown-field", f"/{key}")]


@pytest.mark.parametrize("name", ["model.embed_tokens", "token_embedding", "wte"])
def test_embeddings_are_not_taken_for_linears(tmp_path: Path, name: str) -> None:
    """With llmcompressor 0.14: every two-dimensional weight counts as a linear one."""
    tensors = {f"{name}.weight": numbers(96, 64), "layers.0.o.weight": numbers(64, 64)}
    source = save(tmp_path / "m.safetensors", tensors)
    with pytest.raises(InvalidInput) as caught:
        plan(parsed(recipe()), source)
    assert [each.kind for each in caught.value.problems] == ["embedding"]
    result = CliRunner().invoke(inspect, [str(source), "--emit-recipe"], catch_exceptions=False)
    draft = Recipe.model_validate_json(result.stdout)
    fates = {module.name: module.disposition for module in plan(draft, source).modules}
    assert fates == {name: "protected", "layers.0.o": "quantized"}
    by_name = recipe(rules=[{"modules": [name, "layers.*.o"], "scheme": "w8a8"}])
    assert {m.disposition for m in plan(parsed(by_name), source).modules} == {"quantized"}


def test_a_table_without_a_telling_name_is_counted(tmp_path: Path) -> None:
    """No header tells a table from a linear; a count does, and the plan names every module."""
    tensors = {"tokens.weight": numbers(96, 64), "layers.0.o.weight": numbers(64, 64)}
    source = save(tmp_path / "m.safetensors", tensors)
    counted = recipe(rules=[{"modules": ["**"], "scheme": "w8a8", "count": 1}])
    with pytest.raises(InvalidInput) as caught:
        plan(parsed(counted), source)
    assert refusals(caught) == [("count", "/rules/0/count")]
    told = {m.name: m.disposition for m in plan(parsed(recipe()), source).modules}
    assert told == {"tokens": "quantized", "layers.0.o": "quantized"}


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    """With llmcompressor 0.14: a NaN writes codes 0 and a scale of NaN."""
    weight = numbers(8, 8)
    weight[3, 5] = float("nan")
    source = save(tmp_path / "m.safetensors", {"a.weight": weight})
    with pytest.raises(InvalidInput) as caught:
        convert(parsed(recipe()), source, tmp_path / "out")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.tensor) == ("non-finite", "a.weight")
    assert "[3, 5]" in problem.message
    assert not (tmp_path / "out").exists()


def test_a_bad_tensor_in_the_second_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    """With llmcompressor 0.14: the first shard, a stale index and a config stay."""
    bad = numbers(8, 8)
    bad[0, 0] = float("inf")
    shards = {"a.weight": numbers(8, 8), "b.weight": bad}
    source = tmp_path / "source"
    index = {}
    for number, (name, tensor) in enumerate(shards.items(), 1):
        index[name] = f"model-{number:05d}-of-00002.safetensors"
        save(source / index[name], {name: tensor})
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (source / "config.json").write_text("{}")
    with pytest.raises(InvalidInput) as caught:
        convert(parsed(recipe()), source, tmp_path / "out")
    assert [(each.kind, each.tensor) for each in caught.value.problems] == [
        ("non-finite", "b.weight")
    ]
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_metadata_are_carried_over(tmp_path: Path) -> None:
    """With llmcompressor 0.14: they are dropped."""
    said = {"modelspec.architecture": "x", "license": "apache-2.0"}
    source = save(tmp_path / "m.safetensors", {"a.weight": numbers(8, 8)}, said)
    convert(parsed(recipe()), source, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert said.items() <= file.metadata().items()


def unmarked_nvfp4() -> Tensors:
    """nvfp4 as ComfyUI stores it, without what says so."""
    return {
        "a.weight": torch.full((64, 32), 0x21, dtype=torch.uint8),
        "a.weight_scale": torch.ones(128, 4).to(torch.float8_e4m3fn),
        "a.weight_scale_2": torch.tensor(0.5),
    }


def test_nvfp4_without_markers_is_not_taken_for_plain(tmp_path: Path) -> None:
    """ComfyUI drops the scales without a word, and crashes while it samples."""
    source = save(tmp_path / "m.safetensors", unmarked_nvfp4())
    assert found_wrong(source) == [("missing-marker", "a.weight")]
    for layout, refusal in (
        ("comfyui", ("missing-marker", "a.weight")),
        ("plain", ("unscaled", "a.weight_scale")),
    ):
        with pytest.raises(InvalidInput) as caught:
            plan(parsed(recipe(layout)), source)
        assert refusal in refusals(caught)
    marked = unmarked_nvfp4() | {"a.comfy_quant": marker(format="nvfp4")}
    good = save(tmp_path / "good.safetensors", marked)
    assert found_wrong(good) == []
    # 0x21: the level 1 in even columns, and 0.5.
    state = load_state_dict(good, layout="comfyui")
    assert state["a.weight"][0, :4].tolist() == [0.5, 0.25, 0.5, 0.25]


def test_smoothing_that_is_not_read_is_not_dropped(tmp_path: Path) -> None:
    """Without ``pre_quant_scale`` the numbers of a smoothed nvfp4 weight are others."""
    smoothed = unmarked_nvfp4() | {
        "a.comfy_quant": marker(format="nvfp4"),
        "a.pre_quant_scale": torch.ones(64),
    }
    source = save(tmp_path / "m.safetensors", smoothed)
    (told,) = inspected(source)["not_read"]
    assert (told["kind"], told["tensor"]) == ("unread-tensor", "a.pre_quant_scale")
    with pytest.raises(InvalidInput) as caught:
        plan(parsed(recipe("comfyui")), source)
    assert refusals(caught) == [("unread-tensor", "a.pre_quant_scale")]


def test_fp8_scales_are_applied_or_missed(tmp_path: Path) -> None:
    """ComfyUI: scales that nobody applies, a white image, and the run reports success."""
    codes = numbers(64, 64).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.0625)
    scaled = {"a.weight": codes, "a.weight_scale": scale}
    source = save(tmp_path / "m.safetensors", scaled)
    assert torch.equal(
        load_state_dict(source, layout="fp8-scaled")["a.weight"], codes.float() * scale
    )
    assert any("ComfyUI takes its codes for plain numbers" in n for n in inspected(source)["notes"])
    with pytest.raises(InvalidInput) as caught:
        load_state_dict(source, layout="plain")
    assert ("unscaled", "a.weight") in refusals(caught)
    bare = save(tmp_path / "bare.safetensors", {"a.weight": codes})
    assert found_wrong(bare) == [("missing-scale", "a.weight")]
    left = save(
        tmp_path / "left.safetensors", {"a.weight": codes.bfloat16(), "a.weight_scale": scale}
    )
    assert found_wrong(left) == [("orphan-scale", "a.weight_scale")]


def test_a_marker_without_a_format_is_refused(tmp_path: Path) -> None:
    """comfy-quants writes such; ComfyUI's loader raises without naming the file."""
    codes = torch.ones(64, 64, dtype=torch.int8)
    tensors = {"a.weight": codes, "a.weight_scale": torch.ones(64, 1)}
    source = save(
        tmp_path / "m.safetensors", tensors | {"a.comfy_quant": marker(convrot=True, x="y")}
    )
    (problem,) = inspected(source)["problems"]
    assert (problem["kind"], problem["tensor"]) == ("wrong-marker", "a.comfy_quant")
    assert "'format' is missing" in problem["message"]
    with pytest.raises(InvalidInput) as caught:
        plan(parsed(recipe("comfyui")), source)
    assert refusals(caught) == [("wrong-marker", "a.comfy_quant")]


def test_a_folder_that_is_not_whole_is_told(tmp_path: Path) -> None:
    """Half a download: elsewhere the rest of the model keeps its random start."""
    source = tmp_path / "source"
    index = {"a.weight": "m-00001-of-00002.safetensors", "b.weight": "m-00002-of-00002.safetensors"}
    save(source / index["a.weight"], {"a.weight": numbers(8, 8)})
    (source / "m.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert "missing-shard" in {kind for kind, _ in found_wrong(source)}
    with pytest.raises(InvalidInput):
        plan(parsed(recipe()), source)
