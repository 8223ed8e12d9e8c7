"""Modules split and renamed in the target: the same codes and scales, byte for byte."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from quantrecipe.converter import convert
from quantrecipe.evaluate import verify
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

PIECES = ("q", "k", "v")
NAMES = [
    {"from": "*.qkv", "into": [f"*.to_{piece}" for piece in PIECES]},
    {"from": "*.o", "into": "*.to_out.0"},
    {"from": "*.norm", "into": "*.n"},
]
BY_ROW = sorted(name for name in WEIGHTS if "-channel-" in name or "-group-" in name)


def source_of(kind: str, rows: int, columns: int, seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    made = {f"a.qkv.{role}": t for role, t in KINDS[kind].build(rng, 3 * rows, columns).items()}
    made["a.qkv.bias"] = torch.from_numpy(rng.standard_normal(3 * rows)).bfloat16()
    made["a.o.weight"] = numbers(rng, rows, columns).bfloat16()
    made["a.norm.weight"] = torch.from_numpy(rng.standard_normal(columns)).bfloat16()
    return made


TARGET: Json = {"names": NAMES}


def sliced(whole: Tensors) -> dict[str, bytes]:
    """What the names make of a checkpoint whose rows have scales of their own."""
    found = {}
    for name, tensor in whole.items():
        module, role = name.rsplit(".", 1)
        if module == "a.qkv":
            for piece, rows in zip(PIECES, tensor.chunk(3), strict=True):
                found[f"a.to_{piece}.{role}"] = raw(rows)
        else:
            new = {"a.o": "a.to_out.0", "a.norm": "a.n"}[module]
            found[f"{new}.{role}"] = raw(tensor)
    return found


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


@given(
    kind=st.sampled_from(sorted(KINDS)),
    weight=st.sampled_from(BY_ROW),
    blocks=st.integers(1, 4),
    groups=st.integers(1, 4),
    block_bytes=st.integers(1, 2000),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30)
def test_splitting_and_quantizing_by_row_can_change_places(
    kind: str, weight: str, blocks: int, groups: int, block_bytes: int, seed: int
) -> None:
    tensors = source_of(kind, BLOCK_SIZE[0] * blocks, 4 * groups, seed)
    with tempfile.TemporaryDirectory() as name:
        source = save(Path(name) / "m.safetensors", tensors)
        whole, split, oracle = (
            convert(
                parsed(
                    recipe(
                        WEIGHTS[weight],
                        source=everything(),
                        target=everything(),
                        target_fields=fields,
                    )
                ),
                source,
                Path(name) / str(index),
                converter=converter,
                block_bytes=block_bytes,
            ).out
            for index, (converter, fields) in enumerate(
                (("streaming", {}), ("streaming", TARGET), ("reference", TARGET))
            )
        )
        found = {name: raw(tensor) for name, tensor in tensors_of(split).items()}
        assert found == sliced(tensors_of(whole))
        assert result_of(split) == result_of(oracle)
        assert verify(split, against=source, block_bytes=200).problems == ()
        (read,) = read_lock(split)["source"]
        assert read["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("passthrough", ["bfloat16", "keep"])
def test_what_passes_through_is_split_as_well(tmp_path: Path, kind: str, passthrough: str) -> None:
    source = save(tmp_path / "m.safetensors", source_of(kind, 6, 12, seed=1))
    made = {}
    for name, names in (("whole", {}), ("split", TARGET)):
        fields = {"passthrough_dtype": passthrough} | names
        document = recipe(source=everything(), target=everything(), target_fields=fields)
        document |= {"rules": [], "schemes": {}}
        made[name] = convert(parsed(document), source, tmp_path / name).out
    whole, split = tensors_of(made["whole"]), tensors_of(made["split"])
    expected = sliced({n: t for n, t in whole.items() if not n.endswith("weight_scale")})
    assert expected == {name: raw(split[name]) for name in expected}
    assert verify(made["split"], against=source, block_bytes=100).problems == ()


@pytest.mark.parametrize("measured", ["a.qkv", "a.to_q"])
def test_slices_are_smoothed_by_what_was_measured_of_the_whole(
    tmp_path: Path, measured: str
) -> None:
    rng = np.random.default_rng(4)
    tensors = {"a.qkv.weight": numbers(rng, 9, 8).float()}
    source = save(tmp_path / "m.safetensors", tensors)
    maxima = torch.from_numpy(np.abs(rng.standard_normal((2, 8)))).float()
    names = [measured] if measured == "a.qkv" else [f"a.to_{piece}" for piece in PIECES]
    statistics = tmp_path / "statistics.safetensors"
    save_statistics(statistics, "model", {name: maxima.clone() for name in names})
    smoothing = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "statistics.safetensors",
    }
    scheme = {"weight": weight_spec("int8"), "smoothing": smoothing}
    document = recipe(target=everything(), target_fields=TARGET) | {"schemes": {"all": scheme}}
    path = tmp_path / "recipe.json"
    path.write_text(parsed(document).model_dump_json(by_alias=True, exclude_unset=True))
    out = convert(path, source, tmp_path / "out").out
    weight = dict(zip(PIECES, tensors["a.qkv.weight"].chunk(3), strict=True))
    for piece, factors in ((p, tensors_of(out)[f"a.to_{p}.smoothing"]) for p in PIECES):
        columns = weight[piece].abs().amax(0)
        expected = torch.where(columns > 0, (maxima.amax(0) / columns).sqrt(), 1)
        torch.testing.assert_close(factors, expected)
    assert verify(out, against=source).problems == ()


def test_statistics_of_neither_name_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", {"a.qkv.weight": torch.ones(3, 4)})
    save_statistics(tmp_path / "statistics.safetensors", "model", {"b": torch.ones(1, 4)})
    smoothing = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "statistics.safetensors",
    }
    scheme = {"weight": weight_spec("int8"), "smoothing": smoothing}
    document = recipe(target=everything(), target_fields=TARGET) | {"schemes": {"all": scheme}}
    path = tmp_path / "recipe.json"
    path.write_text(parsed(document).model_dump_json(by_alias=True, exclude_unset=True))
    with pytest.raises(InvalidInput) as caught:
        convert(path, source, tmp_path / "out")
    assert [problem.kind for problem in caught.value.problems] == ["statistics-mismatch"] * 3


def tiny_ideogram(folder: Path, diffusers: Any) -> Any:
    """A small Ideogram 4 in FP8 under the original's names, and its model on the meta device."""
    with torch.device("meta"):
        model = diffusers.Ideogram4Transformer2DModel(
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            intermediate_size=24,
            adaln_dim=4,
            llm_features_dim=12,
        )
    rng = np.random.default_rng(6)
    named = {name: torch.empty(t.shape, device="meta") for name, t in model.state_dict().items()}
    linears = {name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    tensors: Tensors = {}
    for name, tensor in named.items():
        module, _, role = name.rpartition(".")
        shape = list(tensor.shape)
        if module.endswith((".to_k", ".to_v")):
            continue
        if module.endswith(".to_q"):
            module, shape[0] = module.removesuffix("to_q") + "qkv", 3 * shape[0]
        original = module.replace(".to_out.0", ".o")
        if role == "weight" and name.rpartition(".")[0] in linears:
            made = KINDS["float8_e4m3fn-[out]"].build(rng, *shape)
            tensors |= {f"{original}.{each}": value for each, value in made.items()}
        else:
            tensors[name] = torch.from_numpy(rng.standard_normal(shape)).bfloat16()
    save(folder / "diffusion_pytorch_model.safetensors", tensors)
    (folder / "config.json").write_text('{"_class_name": "Ideogram4Transformer2DModel"}')
    return model


@pytest.mark.xdist_group("diffusers")
def test_a_fused_checkpoint_becomes_the_diffusers_model(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that library's own deprecations
        diffusers = pytest.importorskip("diffusers")
        model = tiny_ideogram(tmp_path / "in" / "transformer", diffusers)
    names = {"names": "ideogram4-diffusers"}
    document = recipe(source="fp8-scaled", target="quantrecipe", target_fields=names)
    document["source"]["parts"] = {"conditional": "transformer"}
    document["rules"] = [{"modules": ["layers.*.{attention,feed_forward}.**"], "scheme": "all"}]
    path = "transformer/diffusion_pytorch_model.safetensors"
    document["target"]["parts"] = {"conditional": path}
    out = convert(parsed(document), tmp_path / "in", tmp_path / "out").out
    written = load_file(out / path)
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "Ideogram4Transformer2DModel"
    (mine,) = config["quantization_config"]["modules"].values()
    assert len(mine["names"]) == 2 * 7
    scales = {f"{name}.weight_scale" for name in mine["names"]}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {n: t.shape for n, t in written.items() if n not in scales} == expected
    assert {n for n in written if n.endswith("_scale")} == scales
    for name in mine["names"]:
        assert written[f"{name}.weight"].dtype == torch.int8
        assert written[f"{name}.weight_scale"].shape == (model.get_submodule(name).out_features, 1)
    assert verify(out, against=tmp_path / "in").problems == ()
    # What another converts from there finds the names it has.
    again = recipe(source="quantrecipe", target="quantrecipe", target_fields=names)
    again |= {"rules": [], "schemes": {}}
    again["source"]["parts"] = {"conditional": "transformer"}
    again["target"] |= {"parts": {"conditional": path}, "passthrough_dtype": "keep"}
    kept = convert(parsed(again), out, tmp_path / "again").out
    found = load_file(kept / path)
    assert {n: raw(t) for n, t in found.items()} == {n: raw(t) for n, t in written.items()}


@pytest.mark.xdist_group("diffusers")
@pytest.mark.parametrize("layout", ["fp8-scaled", "quantrecipe"])
def test_there_and_back_again_is_the_original(tmp_path: Path, layout: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that library's own deprecations
        diffusers = pytest.importorskip("diffusers")
        model = tiny_ideogram(tmp_path / "in" / "transformer", diffusers)
    path = "transformer/diffusion_pytorch_model.safetensors"
    folder, before = tmp_path / "in", "fp8-scaled"
    for names in ("ideogram4-diffusers", "ideogram4-original"):
        fields = {"names": names, "passthrough_dtype": "keep", "parts": {"conditional": path}}
        document = recipe(source=before, target=layout, target_fields=fields)
        document |= {"rules": [], "schemes": {}}
        document["source"]["parts"] = {"conditional": "transformer"}
        out = convert(parsed(document), folder, tmp_path / names).out
        assert verify(out, against=folder).problems == ()
        if names == "ideogram4-diffusers":
            weights = {name for name in model.state_dict() if "norm" not in name}
            assert weights <= load_file(out / path).keys()
        folder, before = out, layout
    original, again = load_file(tmp_path / "in" / path), load_file(folder / path)
    assert {n: raw(t) for n, t in again.items()} == {n: raw(t) for n, t in original.items()}
    if layout == "fp8-scaled":
        # In the layout that they were in, the shapes and their places too: all bytes after the
        # header, where metadata say what the file was made by.
        assert data_of(folder / path) == data_of(tmp_path / "in" / path)


def data_of(path: Path) -> tuple[Json, bytes]:
    """What the header says of tensors, and the bytes behind it."""
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    header.pop("__metadata__", None)
    return header, content[length:]
