"""What is kept from beside the source, what is not, and where it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantrecipe.converter import convert
from tests.converter.making import Json, parsed, recipe, small, tree

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
