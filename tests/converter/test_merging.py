"""Modules merged by rows: splitting undone, and the same numbers in whatever order it is done."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from quantrecipe.converter import convert
from quantrecipe.converter.ranking import rank
from quantrecipe.evaluate import verify
from quantrecipe.loaders import load_model, load_state_dict
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.testing.strategies import BLOCK_SIZE
from tests.converter.making import (
    KINDS,
    WEIGHTS,
    Json,
    Tensors,
    everything,
    numbers,
    parsed,
    raw,
    read_lock,
    recipe,
    result_of,
    save,
    save_statistics,
    weight_spec,
)

SPLIT: list[Json] = [
    {"from": "*.qkv", "into": ["*.q", "*.k", "*.v"]},
    {"from": "*.o", "into": "*.to_out.0"},
]
MERGE = [{"from": each["into"], "into": each["from"]} for each in SPLIT]
BY_ROW = sorted(name for name in WEIGHTS if "-channel-" in name or "-group-" in name)
PACKED: dict[str, Json] = {
    "int4": {"format": "int4", "granularity": "group", "group_size": 16},
    "int4-zeros": {"format": "int4", "granularity": "group", "group_size": 16, "symmetric": False},
    "nf4": {"format": "nf4", "granularity": "block", "block_size": 64},
}


def converted(
    source: Path,
    out: Path,
    names: list[Json] | str | None = None,
    weight: Json | None = None,
    *,
    layouts: tuple[Any, Any] | None = None,
    parts: Mapping[str, str] | None = None,
    fields: Json | None = None,
    converter: str = "streaming",
    block_bytes: int = 1 << 20,
) -> Path:
    """A conversion that keeps what is stored, or quantizes all of it."""
    before, after = layouts or (everything(), everything())
    wanted = {"passthrough_dtype": "keep"} | ({} if names is None else {"names": names})
    document = recipe(weight, source=before, target=after, target_fields=wanted | (fields or {}))
    if weight is None:
        document |= {"rules": [], "schemes": {}}
    if parts is not None:
        document["source"]["parts"] = dict(parts)
    return convert(parsed(document), source, out, converter=converter, block_bytes=block_bytes).out


def tensors_of(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= load_file(path)
    return found


def bytes_of(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in tensors.items()}


def meant(tensors: Tensors) -> Tensors:
    """With a scale for each row where there is one for all: the same numbers."""
    found = dict(tensors)
    for name, scale in tensors.items():
        if name.endswith("qkv.weight_scale") and scale.numel() == 1:
            rows = len(tensors[name.removesuffix("_scale")])
            found[name] = scale.reshape(1, 1).expand(rows, 1)
    return found


@given(
    kind=st.sampled_from(sorted(KINDS)),
    blocks=st.integers(1, 4),
    groups=st.integers(1, 4),
    bias=st.booleans(),
    shard=st.sampled_from([None, "1B", "200B"]),
    block_bytes=st.integers(1, 2000),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=12)
def test_merging_undoes_splitting(
    kind: str,
    blocks: int,
    groups: int,
    bias: bool,
    shard: str | None,
    block_bytes: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    rows = BLOCK_SIZE[0] * blocks
    tensors: Tensors = {}
    for layer in ("x", "y"):
        built = KINDS[kind].build(rng, 3 * rows, 4 * groups)
        tensors |= {f"{layer}.qkv.{role}": tensor for role, tensor in built.items()}
        tensors[f"{layer}.o.weight"] = numbers(rng, rows, 4 * groups).bfloat16()
        tensors[f"{layer}.norm.weight"] = torch.ones(rows)
    if bias:
        tensors["x.qkv.bias"] = torch.from_numpy(rng.standard_normal(3 * rows)).half()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = save(folder / "m.safetensors", tensors)
        fields = {"max_shard_size": shard} if shard is not None else {}
        apart = converted(source, folder / "apart", SPLIT, fields=fields)
        again = converted(apart, folder / "again", MERGE, block_bytes=block_bytes)
        oracle = converted(apart, folder / "oracle", MERGE, converter="reference")
        pieces = {name.split(".")[1] for name in tensors_of(apart)}
        assert pieces == {"q", "k", "v", "to_out", "norm"}
        assert bytes_of(tensors_of(again)) == bytes_of(meant(tensors))
        assert result_of(again) == result_of(oracle)
        assert verify(again, against=apart, block_bytes=100).problems == ()
        assert [each["from"] for each in read_lock(again)["names"]] == [m["from"] for m in MERGE]


@given(
    kind=st.sampled_from(sorted(KINDS)),
    weight=st.sampled_from(BY_ROW),
    rows=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    groups=st.integers(1, 3),
    block_bytes=st.integers(1, 2000),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=8)
def test_merging_and_quantizing_by_row_can_change_places(
    kind: str, weight: str, rows: list[int], groups: int, block_bytes: int, seed: int
) -> None:
    """Pieces of different sizes, each in a file of its own."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for piece, count in zip("qkv", rows, strict=True):
            height = BLOCK_SIZE[0] if kind.endswith("block") else 1
            built = KINDS[kind].build(rng, count * height, 4 * groups)
            made = {f"a.{piece}.{role}": tensor for role, tensor in built.items()}
            save(folder / "in" / f"{piece}.safetensors", made)
        how: Json = {"parts": {"model": "*.safetensors"}, "block_bytes": block_bytes}
        spec = WEIGHTS[weight]
        first = converted(folder / "in", folder / "first", MERGE, spec, **how)
        then = converted(folder / "in", folder / "then", None, spec, **how)
        other = converted(then, folder / "other", MERGE, block_bytes=block_bytes)
        assert bytes_of(tensors_of(first)) == bytes_of(tensors_of(other))
        how["converter"] = "reference"
        oracle = converted(folder / "in", folder / "oracle", MERGE, spec, **how)
        assert result_of(first) == result_of(oracle)
        assert verify(first, against=folder / "in", block_bytes=200).problems == ()
        # In whatever shape: the numbers are those of the pieces, one after the other.
        whole, apart = load_state_dict(first), load_state_dict(then)
        pieces = [apart[f"a.{piece}.weight"] for piece in "qkv"]
        assert torch.equal(whole["a.qkv.weight"], torch.cat(pieces))


@pytest.mark.parametrize("layout", ["quantrecipe", "compressed-tensors"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_codes_are_merged_and_split(tmp_path: Path, layout: str, name: str) -> None:
    if (layout, name) == ("compressed-tensors", "nf4"):
        layout = "quantrecipe"
    rng = np.random.default_rng(8)
    tensors: Tensors = {}
    for piece, rows in (("q", 8), ("k", 8), ("v", 8)):
        tensors[f"a.{piece}.weight"] = numbers(rng, rows, 64).bfloat16()
        tensors[f"a.{piece}.bias"] = torch.from_numpy(rng.standard_normal(rows)).bfloat16()
    source = save(tmp_path / "in" / "model.safetensors", tensors)
    quantize, keep = ("plain", layout), (layout, layout)
    whole = converted(source, tmp_path / "whole", MERGE, PACKED[name], layouts=quantize)
    apart = converted(source, tmp_path / "apart", None, PACKED[name], layouts=quantize)
    merged = converted(apart, tmp_path / "merged", MERGE, layouts=keep, block_bytes=300)
    expected = bytes_of(tensors_of(whole))
    assert ("a.qkv.weight_zero_point" in expected) == (name == "int4-zeros")
    assert bytes_of(tensors_of(merged)) == expected
    assert verify(merged, against=apart, block_bytes=200).problems == ()
    split = converted(merged, tmp_path / "split", SPLIT, layouts=keep)
    assert bytes_of(tensors_of(split)) == bytes_of(tensors_of(apart))


def test_parts_that_share_a_file_are_merged_each(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    tensors: Tensors = {}
    for part in ("one", "two"):
        for piece in "qkv":
            built = KINDS["float8_e4m3fn-[out]"].build(rng, 3, 8)
            saved = {f"a.{piece}.{role}": tensor for role, tensor in built.items()}
            tensors |= {f"{part}.{name}": tensor for name, tensor in saved.items()}
            save(tmp_path / "in" / part / f"{piece}.safetensors", saved)
    parts, scheme = {"one": "one/*", "two": "two/*"}, weight_spec("int8")
    layouts = ("fp8-scaled", "transformerlab")
    out = converted(tmp_path / "in", tmp_path / "out", MERGE, scheme, layouts=layouts, parts=parts)
    written = tensors_of(out)
    assert set(written) == {f"{part}.a.qkv.{role}" for part in parts for role in ("wq", "ws")}
    assert verify(out, against=tmp_path / "in").problems == ()
    for part in parts:
        whole = torch.cat(
            [
                KINDS["float8_e4m3fn-[out]"].meaning(
                    {
                        role: tensors[f"{part}.a.{piece}.{role}"]
                        for role in ("weight", "weight_scale")
                    }
                )
                for piece in "qkv"
            ]
        )
        scale = whole.abs().amax(1) / 127
        torch.testing.assert_close(written[f"{part}.a.qkv.ws"].flatten().double(), scale)


def test_a_merged_module_is_loaded_by_its_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = {"q": 6, "k": 2, "v": 2}
    pieces = {f"a.{piece}.weight": numbers(rng, rows[piece], 8).float() for piece in rows}
    source = save(tmp_path / "m.safetensors", pieces)
    out = converted(source, tmp_path / "out", MERGE, weight_spec("int8"))
    model: Any = torch.nn.ModuleDict()
    model["a"] = torch.nn.ModuleDict({"qkv": torch.nn.Linear(8, 10, bias=False)})
    assert load_model(model, out, kernel="reference").quantized == 1
    x = torch.from_numpy(rng.standard_normal((3, 8))).float()
    expected = x @ load_state_dict(out)["a.qkv.weight"].T
    torch.testing.assert_close(model["a"]["qkv"](x), expected)


@pytest.mark.parametrize("converter", ["streaming", "reference"])
@pytest.mark.parametrize("role", ["weight", "weight_scale"])
def test_a_number_that_is_none_is_named_where_it_lies(
    tmp_path: Path, role: str, converter: str
) -> None:
    rng = np.random.default_rng(1)
    for piece in "qkv":
        made = KINDS["float8_e4m3fn-[out]"].build(rng, 4, 8)
        if piece == "k":
            made[role][2] = float("nan")
        named = {f"a.{piece}.{each}": tensor for each, tensor in made.items()}
        save(tmp_path / "in" / f"{piece}.safetensors", named)
    with pytest.raises(InvalidInput) as caught:
        converted(
            tmp_path / "in",
            tmp_path / "out",
            MERGE,
            weight_spec("int8"),
            parts={"model": "*.safetensors"},
            block_bytes=64,
            converter=converter,
        )
    (problem,) = caught.value.problems
    assert (problem.kind, problem.tensor) == ("non-finite", f"a.k.{role}")
    assert problem.file == str(tmp_path / "in" / "k.safetensors")
    assert "at index [2" in problem.message


def test_a_lock_with_other_names_is_found_out(tmp_path: Path) -> None:
    from quantrecipe.schema.canonical import lock_digest

    rng = np.random.default_rng(1)
    pieces = {f"a.{piece}.weight": numbers(rng, 2, 8).float() for piece in "qkv"}
    source = save(tmp_path / "m.safetensors", pieces)
    out = converted(source, tmp_path / "out", MERGE)
    lock = json.loads((out / "recipe.lock.json").read_text())
    for changed in (None, lock["names"][:1], [{"from": ["*.k", "*.q", "*.v"], "into": "*.qkv"}]):
        edited = {key: value for key, value in lock.items() if key != "names"}
        edited |= {} if changed is None else {"names": changed}
        edited["sha256"] = lock_digest(edited)
        (out / "recipe.lock.json").write_text(json.dumps(edited))
        pointers = {problem.pointer for problem in verify(out).problems}
        assert "/names" in pointers


# What was measured


def measured_recipe(folder: Path, scheme: Json) -> Path:
    document = recipe(target=everything(), target_fields={"names": MERGE})
    document["schemes"] = {"all": scheme}
    path = folder / "recipe.json"
    path.write_text(json.dumps(document))
    return path


def smoothed() -> Json:
    smoothing = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "statistics.safetensors",
    }
    return {"weight": weight_spec("int8"), "smoothing": smoothing}


@pytest.mark.parametrize("measured", [("qkv",), ("q", "k", "v"), ("k",), ("q", "v")])
def test_the_whole_is_smoothed_by_the_largest_inputs_of_its_pieces(
    tmp_path: Path, measured: tuple[str, ...]
) -> None:
    rng = np.random.default_rng(4)
    pieces = {f"a.{piece}.weight": numbers(rng, 3, 8).float() for piece in "qkv"}
    source = save(tmp_path / "m.safetensors", pieces)
    maxima = {
        f"a.{name}": torch.from_numpy(np.abs(rng.standard_normal((2, 8)))).float()
        for name in measured
    }
    save_statistics(tmp_path / "statistics.safetensors", "model", maxima)
    out = convert(measured_recipe(tmp_path, smoothed()), source, tmp_path / "out").out
    columns = torch.cat(list(pieces.values())).abs().amax(0)
    inputs = torch.cat(list(maxima.values())).amax(0)
    expected = torch.where(columns > 0, (inputs / columns).sqrt(), 1)
    torch.testing.assert_close(tensors_of(out)["a.qkv.smoothing"], expected)
    assert verify(out, against=source).problems == ()


def test_statistics_of_no_piece_are_refused(tmp_path: Path) -> None:
    source = save(
        tmp_path / "m.safetensors", {f"a.{piece}.weight": torch.ones(3, 4) for piece in "qkv"}
    )
    save_statistics(tmp_path / "statistics.safetensors", "model", {"b": torch.ones(1, 4)})
    with pytest.raises(InvalidInput) as caught:
        convert(measured_recipe(tmp_path, smoothed()), source, tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.kind == "statistics-mismatch"
    assert "input_absmax of 'a.qkv' of part 'model' was not measured" in problem.message


@pytest.mark.parametrize("same", [True, False])
def test_second_moments_of_pieces_are_one(tmp_path: Path, same: bool) -> None:
    rng = np.random.default_rng(4)
    pieces = {f"a.{piece}.weight": numbers(rng, 3, 8).float() for piece in "qkv"}
    source = save(tmp_path / "m.safetensors", pieces)
    moments = {f"a.{piece}": torch.from_numpy(rng.random((1, 8))) for piece in "qkv"}
    if same:
        moments = dict.fromkeys(moments, moments["a.q"])
    more = {
        f"model/{name}/{what}": tensor.clone()
        for name, tensor in moments.items()
        for what, tensor in (("input_second_moment", tensor), ("tokens", torch.ones(1).long()))
    }
    maxima = {name: torch.ones(1, 8) for name in moments}
    path = save_statistics(tmp_path / "statistics.safetensors", "model", maxima, more)
    quantizer = {"kind": "clip-search", "statistics": "statistics.safetensors"}
    wanted = measured_recipe(tmp_path, {"weight": weight_spec("int8") | {"quantizer": quantizer}})
    if not same:
        with pytest.raises(InvalidInput) as caught:
            convert(wanted, source, tmp_path / "out")
        assert {problem.kind for problem in caught.value.problems} == {"statistics-mismatch"}
        assert "second moments differ" in caught.value.problems[0].message
        return
    out = convert(wanted, source, tmp_path / "out").out
    oracle = convert(wanted, source, tmp_path / "oracle", converter="reference").out
    assert result_of(out) == result_of(oracle)
    (module,) = rank(wanted, source, statistics=path).modules
    assert (module.name, module.basis) == ("a.qkv", "moments")
