"""What is kept from beside the source, what is not, and where it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quantrecipe.converter import convert
from quantrecipe.evaluate import verify
from quantrecipe.schema.problems import InvalidInput
from tests.converter.making import (
    KINDS,
    Json,
    parsed,
    read_lock,
    recipe,
    save,
    save_statistics,
    small,
    tree,
    weight_spec,
)
from tests.evaluate.tampering import edit_lock

OURS = {"recipe.json", "recipe.lock.json"}
PARTS = {"conditional": "transformer", "unconditional": "unconditional_transformer"}


def sidecars(out: Path) -> set[str]:
    return {path for path in tree(out) if not path.endswith(".safetensors")} - OURS


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "modules.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE.md",
        "NOTICE",
    ],
)
def test_what_still_holds_is_kept_byte_for_byte(tmp_path: Path, name: str) -> None:
    small(tmp_path / "in" / "m.safetensors")
    content = b'{ "hidden_size":  8 }\r\n\xc3\xa9'
    (tmp_path / "in" / name).write_bytes(content)
    out = convert(parsed(recipe()), tmp_path / "in", tmp_path / "out").out
    assert sidecars(out) == {name}
    assert (out / name).read_bytes() == content


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "model_index.txt",
        "pytorch_model.bin",
        "quantize_config.json",
        "quantization_config.json",
        "hf_quant_config.json",
        "notes.json",
        ".gitattributes",
    ],
)
def test_what_is_of_other_weights_or_unknown_is_not(tmp_path: Path, name: str) -> None:
    small(tmp_path / "in" / "m.safetensors")
    (tmp_path / "in" / name).write_text("{}")
    (tmp_path / "in" / "tokenizer.json").mkdir()
    out = convert(parsed(recipe()), tmp_path / "in", tmp_path / "out").out
    assert sidecars(out) == set()


def test_how_the_source_was_quantized_is_taken_out(tmp_path: Path) -> None:
    small(tmp_path / "in" / "m.safetensors")
    config = {"name": "é", "quantization_config": {"bits": 8}, "layers": 2}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    out = convert(parsed(recipe()), tmp_path / "in", tmp_path / "out").out
    text = (out / "config.json").read_text("utf-8")
    assert list(json.loads(text).items()) == [("name", "é"), ("layers", 2)]
    assert "é" in text


@pytest.mark.parametrize("content", ["[1]", "not json", '{"a": {"quantization_config": 1}}', ""])
def test_a_config_of_another_kind_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    small(tmp_path / "in" / "m.safetensors")
    (tmp_path / "in" / "config.json").write_text(content)
    out = convert(parsed(recipe()), tmp_path / "in", tmp_path / "out").out
    assert (out / "config.json").read_text() == content


def two_parts(folder: Path) -> Path:
    for index, (part, place) in enumerate(PARTS.items()):
        small(folder / place / "m.safetensors", seed=index)
        (folder / place / "config.json").write_text(json.dumps({"part": part}))
    return folder


@pytest.mark.parametrize(
    ("target", "places"),
    [
        (
            {"layout": "transformerlab", "file": "deep/all.safetensors"},
            {"conditional": "deep/conditional", "unconditional": "deep/unconditional"},
        ),
        (
            {
                "layout": "int8-scaled",
                "parts": {part: f"{place}/m.safetensors" for part, place in PARTS.items()},
            },
            PARTS,
        ),
        (
            {
                "layout": "int8-scaled",
                "parts": {part: f"{part}.safetensors" for part in PARTS},
            },
            {part: part for part in PARTS},
        ),
    ],
    ids=["one file", "folders", "one folder"],
)
def test_each_part_keeps_its_own(tmp_path: Path, target: Json, places: dict[str, str]) -> None:
    source = two_parts(tmp_path / "in")
    made = recipe(source="plain")
    made |= {"source": {"layout": "plain", "parts": PARTS}, "target": target}
    out = convert(parsed(made), source, tmp_path / "out").out
    assert sidecars(out) == {f"{place}/config.json" for place in places.values()}
    for part, place in places.items():
        assert json.loads((out / place / "config.json").read_text()) == {"part": part}


# What a layout writes into config.json


def configured(**fields: Any) -> Json:
    return recipe(target="quantrecipe", **fields)


FRAGMENT = {
    "quant_method": "quantrecipe",
    "version": 1,
    "schemes": {
        "all": {
            "weight": {
                "format": "int8",
                "granularity": "channel",
                "scale_dtype": "float32",
                "quantizer": {"kind": "absmax"},
                "symmetric": True,
            }
        }
    },
    "modules": {"all": {"names": ["a", "b"], "smoothing": []}},
}


def config_of(folder: Path) -> Json:
    found: Json = json.loads((folder / "config.json").read_text("utf-8"))
    return found


def test_a_config_tells_what_the_output_is(tmp_path: Path) -> None:
    small(tmp_path / "in" / "m.safetensors")
    config = {"quantization_config": {"bits": 8}, "name": "é"}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    out = convert(parsed(configured()), tmp_path / "in", tmp_path / "out").out
    assert list(config_of(out).items()) == [("name", "é"), ("quantization_config", FRAGMENT)]
    locked = {each["path"] for each in read_lock(out)["sidecars"]}
    assert locked == {"config.json", "recipe.json"}
    assert verify(out, against=tmp_path / "in").problems == ()


def test_a_config_is_made_where_there_is_none(tmp_path: Path) -> None:
    small(tmp_path / "in" / "m.safetensors")
    out = convert(parsed(configured()), tmp_path / "in", tmp_path / "out").out
    assert config_of(out) == {"quantization_config": FRAGMENT}
    assert verify(out).problems == ()
    convert(parsed(configured()), tmp_path / "in", tmp_path / "out", force=True)
    assert config_of(out) == {"quantization_config": FRAGMENT}


def test_each_part_has_a_config_of_its_own(tmp_path: Path) -> None:
    for folder in PARTS.values():
        small(tmp_path / "in" / folder / "m.safetensors")
        (tmp_path / "in" / folder / "config.json").write_text(json.dumps({"of": folder}))
    document = configured()
    document["source"]["parts"] = PARTS
    document["rules"] = [{"modules": ["a"], "scheme": "all", "parts": ["conditional"]}]
    document["target"]["parts"] = {part: f"{path}/m.safetensors" for part, path in PARTS.items()}
    out = convert(parsed(document), tmp_path / "in", tmp_path / "out").out
    one, two = (config_of(out / folder) for folder in PARTS.values())
    assert one["quantization_config"]["modules"]["all"]["names"] == ["a"]
    # Nothing there is quantized, so any loader reads it.
    assert two == {"of": "unconditional_transformer"}
    assert verify(out, against=tmp_path / "in").problems == ()


def test_parts_that_would_share_a_config_are_refused(tmp_path: Path) -> None:
    for folder in PARTS.values():
        small(tmp_path / "in" / folder / "m.safetensors")
    document = configured()
    document["source"]["parts"] = PARTS
    document["target"]["parts"] = {part: f"{part}.safetensors" for part in PARTS}
    with pytest.raises(InvalidInput) as caught:
        convert(parsed(document), tmp_path / "in", tmp_path / "out")
    assert [(p.kind, p.pointer) for p in caught.value.problems] == [
        ("parts-share-config", "/target")
    ]


@pytest.mark.parametrize("content", ["[1]", "not json", ""])
def test_a_config_that_nothing_can_go_into_is_refused(tmp_path: Path, content: str) -> None:
    small(tmp_path / "in" / "m.safetensors")
    (tmp_path / "in" / "config.json").write_text(content)
    with pytest.raises(InvalidInput) as caught:
        convert(parsed(configured()), tmp_path / "in", tmp_path / "out")
    assert [problem.kind for problem in caught.value.problems] == ["bad-config"]
    assert not (tmp_path / "out").exists()


def test_what_is_kept_quantized_is_told_as_well(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    tensors = KINDS["float8_e4m3fn-[out]"].build(rng, 6, 8)
    save(
        tmp_path / "in" / "m.safetensors",
        {f"a.{role}": tensor for role, tensor in tensors.items()} | {"b.weight": torch.ones(4, 4)},
    )
    document = configured(rules=[{"modules": ["b"], "scheme": "all"}])
    document["source"]["layout"] = "fp8-scaled"
    document["target"]["passthrough_dtype"] = "keep"
    out = convert(parsed(document), tmp_path / "in", tmp_path / "out").out
    modules = config_of(out)["quantization_config"]["modules"]
    assert {scheme: mine["names"] for scheme, mine in modules.items()} == {
        "all": ["b"],
        "kept-float8_e4m3fn-channel": ["a"],
    }
    assert load_file(out / "model.safetensors")["a.weight_scale"].shape == (6, 1)


@pytest.mark.parametrize("change", ["edited", "missing"])
def test_a_config_that_was_changed_is_found(tmp_path: Path, change: str) -> None:
    small(tmp_path / "in" / "m.safetensors")
    out = convert(parsed(configured()), tmp_path / "in", tmp_path / "out").out
    if change == "missing":
        (out / "config.json").unlink()
    else:
        text = (out / "config.json").read_text("utf-8")
        (out / "config.json").write_text(text.replace('"b"', '"c"'), "utf-8")
    expected = {"edited": "config-differs", "missing": "missing-file"}[change]
    assert [problem.kind for problem in verify(out).problems] == [expected]


def test_which_modules_are_smoothed_is_told(tmp_path: Path) -> None:
    small(tmp_path / "in" / "m.safetensors")
    maxima = {"a": torch.ones(1, 12)}
    save_statistics(tmp_path / "statistics.safetensors", "model", maxima)
    smoothing = {"kind": "smoothquant", "alpha": 0.5, "apply": "online"}
    smoothing["statistics"] = "statistics.safetensors"
    weight = weight_spec("float8_e4m3fn")
    document = configured(
        schemes={"s": {"weight": weight, "smoothing": smoothing}, "t": {"weight": weight}},
        rules=[{"modules": ["a"], "scheme": "s"}, {"modules": ["b"], "scheme": "t"}],
    )
    (tmp_path / "recipe.json").write_text(json.dumps(document))
    out = convert(tmp_path / "recipe.json", tmp_path / "in", tmp_path / "out").out
    assert config_of(out)["quantization_config"]["modules"] == {
        "s": {"names": ["a"], "smoothing": ["a"]},
        "t": {"names": ["b"], "smoothing": []},
    }
    assert load_file(out / "model.safetensors")["a.smoothing"].shape == (12,)
    assert verify(out, against=tmp_path / "in").problems == ()


def test_a_lock_without_the_config_is_refused(tmp_path: Path) -> None:
    small(tmp_path / "in" / "m.safetensors")
    out = convert(parsed(configured()), tmp_path / "in", tmp_path / "out").out

    def forget(lock: Json) -> None:
        lock["sidecars"] = [each for each in lock["sidecars"] if each["path"] != "config.json"]

    edit_lock(out, forget)
    (problem,) = verify(out).problems
    assert (problem.kind, problem.pointer) == ("bad-lock", "/sidecars")
    assert "'config.json' was written, and is not listed" in problem.message
