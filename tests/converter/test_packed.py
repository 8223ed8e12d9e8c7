"""int4 and nf4 from source to model: the same bytes however they are made, and what they mean."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantrecipe.converter import convert
from quantrecipe.evaluate import verify
from quantrecipe.evaluate.proofs import prove_bound
from quantrecipe.formats import dequantize, quantize
from quantrecipe.formats.folding import FoldedFactors
from quantrecipe.formats.rotation import rotate_
from quantrecipe.loaders import load_model, load_state_dict, open_checkpoint
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.registry import named_layout
from quantrecipe.schema.schemes import Absmax, AnyScaledWeight, PlainWeight
from tests.converter.making import (
    Json,
    numbers,
    parsed,
    read_lock,
    recipe,
    result_of,
    save,
    save_statistics,
    tree,
)

SPECS: dict[str, Json] = {
    "int4": {"format": "int4", "granularity": "group", "group_size": 32},
    "int4-zeros": {
        "format": "int4",
        "granularity": "group",
        "group_size": 16,
        "symmetric": False,
        "scale_dtype": "bfloat16",
    },
    "nf4": {"format": "nf4", "granularity": "block", "block_size": 64},
}
PAIRS = [
    ("quantrecipe", "int4"),
    ("quantrecipe", "int4-zeros"),
    ("quantrecipe", "nf4"),
    ("compressed-tensors", "int4"),
    ("compressed-tensors", "int4-zeros"),
]
pairs = pytest.mark.parametrize(("layout", "name"), PAIRS, ids=["-".join(pair) for pair in PAIRS])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a: Any = nn.Linear(128, 20)
        self.b = nn.Linear(64, 13, bias=False)
        self.norm = nn.LayerNorm(8, bias=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("source")
    tensors = {
        "a.weight": numbers(rng, 20, 128).bfloat16(),
        "a.bias": torch.from_numpy(rng.standard_normal(20)).bfloat16(),
        "b.weight": numbers(rng, 13, 64).float(),
        "norm.weight": torch.ones(8),
    }
    save(folder / "model.safetensors", tensors)
    return folder


def made(source: Path, out: Path, layout: Any, name: str, **means: Any) -> Path:
    document = recipe(SPECS[name], target=layout, target_fields={"file": "model.safetensors"})
    convert(parsed(document), source, out, **means)
    return out


def spec_of(name: str) -> AnyScaledWeight:
    weight = parsed(recipe(SPECS[name])).schemes["all"].weight
    assert not isinstance(weight, PlainWeight)
    return weight


def sources(source: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(source / "model.safetensors")
    return tensors


def meant(source: Path, name: str) -> dict[str, Tensor]:
    """The weights as the format's definition has them."""
    spec = spec_of(name)
    found: dict[str, Tensor] = {}
    for module in ("a", "b"):
        weight = sources(source)[f"{module}.weight"]
        stored = quantize(weight, spec)
        found[module] = dequantize(stored.codes, stored.scale, spec, zero_point=stored.zero_point)
    return found


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """What the reference converter makes of every pair."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        (layout, name): made(source, folder / f"{layout}-{name}", layout, name,
                             converter="reference")
        for layout, name in PAIRS
    }  # fmt: skip


@given(pair=st.sampled_from(PAIRS), block_bytes=st.integers(1, 24 * 512), jobs=st.integers(1, 2))
@settings(max_examples=12)
def test_every_cut_gives_the_bytes_of_the_reference(
    pair: tuple[str, str],
    block_bytes: int,
    jobs: int,
    source: Path,
    whole: dict[tuple[str, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    out = tmp_path_factory.mktemp("cut") / "out"
    made(source, out, *pair, block_bytes=block_bytes, jobs=jobs)
    assert result_of(out) == result_of(whole[pair])


@pairs
def test_units_of_few_rows_give_the_same_bytes(
    layout: str,
    name: str,
    source: Path,
    whole: dict[tuple[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Zero points that are packed over 8 rows keep those together."""
    monkeypatch.setattr("quantrecipe.converter.units.cut.__defaults__", (1,))
    out = made(source, tmp_path / "out", layout, name)
    file = "model.safetensors"
    assert tree(out)[file] == tree(whole[layout, name])[file]


@pairs
def test_what_is_stored_means_what_the_format_says(
    layout: str, name: str, source: Path, whole: dict[tuple[str, str], Path]
) -> None:
    state = load_state_dict(whole[layout, name])
    for module, weight in meant(source, name).items():
        assert torch.equal(state[f"{module}.weight"], weight)
    with open_checkpoint(whole[layout, name]) as checkpoint:
        rows = checkpoint.rows("a", None, 8, 13)
    assert torch.equal(rows, state["a.weight"][8:13])


@pairs
def test_every_bound_is_proven(
    layout: str, name: str, source: Path, whole: dict[tuple[str, str], Path]
) -> None:
    found = verify(whole[layout, name], against=source)
    assert not found.problems
    assert {module.name for module in found.measured} == {"a", "b"}
    assert all(0.5 < module.of_bound <= 1 for module in found.measured)


@pytest.mark.parametrize("name", list(SPECS))
def test_scales_may_be_searched_for(name: str, source: Path, tmp_path: Path) -> None:
    """The same bytes whoever does it, proven, and nearer to the source than absmax."""
    found = {}
    for kind in ("absmax", "clip-search"):
        document = recipe(SPECS[name] | {"quantizer": {"kind": kind}}, target="quantrecipe")
        out = tmp_path / kind
        convert(parsed(document), source, out, block_bytes=1500)
        convert(parsed(document), source, tmp_path / f"whole-{kind}", converter="reference")
        assert result_of(out) == result_of(tmp_path / f"whole-{kind}")
        assert not verify(out, against=source).problems
        found[kind] = [module["error"]["sqnr_db"] for module in read_lock(out)["modules"][:2]]
    plain, searched = found["absmax"], found["clip-search"]
    assert all(one >= other for one, other in zip(searched, plain, strict=True))
    assert tree(tmp_path / "absmax") != tree(tmp_path / "clip-search")


def rotated(name: str, *, smoothed: bool, **fields: Any) -> Json:
    scheme: Json = {"weight": SPECS[name], "rotation": {"kind": "hadamard", "size": 64}}
    if smoothed:
        scheme["smoothing"] = {
            "kind": "smoothquant",
            "alpha": 0.5,
            "apply": "online",
            "statistics": "statistics.safetensors",
        }
    return recipe(schemes={"all": scheme}, **fields)


@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smoothed"])
@pytest.mark.parametrize("name", list(SPECS))
def test_rotated_weights_are_packed_and_proven_and_computed_with(
    name: str, smoothed: bool, source: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    columns = {"a": 128, "b": 64}
    maxima = {
        module: torch.from_numpy(2.0 ** rng.uniform(-3, 5, (1, size))).float()
        for module, size in columns.items()
    }
    save_statistics(tmp_path / "statistics.safetensors", "model", maxima)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(rotated(name, smoothed=smoothed, target="quantrecipe")))
    out = convert(path, source, tmp_path / "out", block_bytes=1500).out
    again = convert(path, source, tmp_path / "whole", converter="reference").out
    assert result_of(out) == result_of(again)
    assert not verify(out, against=source).problems
    (file,) = out.glob("*.safetensors")
    stored, state, before = load_file(file), load_state_dict(out), sources(source)
    spec, model = spec_of(name), Two()
    load_model(model, out)
    for module in columns:
        factors = stored.get(f"{module}.smoothing")
        assert (factors is not None) == smoothed
        one = torch.ones(1) if factors is None else factors
        turned = rotate_(before[f"{module}.weight"].float() * one, 64)
        made = quantize(turned, spec)
        weight = dequantize(made.codes, made.scale, spec, zero_point=made.zero_point)
        assert torch.equal(getattr(model, module).dequantize(), weight)
        back = rotate_(weight.clone(), 64) / one
        assert torch.equal(state[f"{module}.weight"], back)
        x = torch.randn(5, columns[module], generator=torch.Generator().manual_seed(0))
        computed = getattr(model, module)(x).double()
        exact = x.double() @ back.double().T
        if module == "a":
            exact += stored["a.bias"].double()
        torch.testing.assert_close(computed, exact, rtol=1e-4, atol=1e-3)


def test_a_config_that_cannot_say_a_rotation_refuses_it(source: Path, tmp_path: Path) -> None:
    document = rotated("int4", smoothed=False, target="compressed-tensors")
    with pytest.raises(InvalidInput, match="cannot tell a reader that int4 weights are rotated"):
        convert(parsed(document), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pairs
def test_a_changed_zero_point_or_code_is_found(
    layout: str, name: str, source: Path, whole: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """With the same digests nowhere to compare with: from the numbers alone."""
    file = whole[layout, name] / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.startswith("a.weight") and "scale" not in key
               and "shape" not in key and ("zero" in key) == (name == "int4-zeros"))  # fmt: skip
    tensors[key].view(torch.uint8)[:] ^= 0xFF
    save_file(tensors, tmp_path / "model.safetensors")
    with (
        open_checkpoint(source, layout="plain") as before,
        open_checkpoint(tmp_path, layout=named_layout(layout)) as after,
    ):
        found = prove_bound(
            before, after, "a", "model", 1 << 20, Absmax(kind="absmax"), FoldedFactors()
        )
    kinds = {problem.kind for problem in found.problems}
    assert kinds >= ({"zero-point-differs"} if name == "int4-zeros" else {"bound-broken"})


@pairs
@pytest.mark.parametrize("kernel", ["reference", "dequantized", "auto"])
def test_a_model_computes_with_packed_codes(
    layout: str, name: str, kernel: str, source: Path, whole: dict[tuple[str, str], Path]
) -> None:
    model, weights = Two(), meant(source, name)
    report = load_model(model, whole[layout, name], kernel=kernel)
    assert report.quantized == 2
    assert ("a.weight_shape" in report.left_out) == (layout == "compressed-tensors")
    stored = load_file(whole[layout, name] / "model.safetensors")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[key]), key
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = x.double() @ weights["a"].double().T + stored["a.bias"].double()
    found = model.a(x)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    found.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weights["a"].sum(0).expand(5, -1), rtol=1e-4, atol=1e-3)
    half = copy.deepcopy(model).bfloat16()
    b: Any = half.b
    assert torch.equal(b.dequantize(), weights["b"])
    assert half.a(x.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_other_kernels_refuse(name: str, whole: dict[tuple[str, str], Path]) -> None:
    with pytest.raises(InvalidInput, match="kernel 'int_mm' cannot compute this"):
        load_model(Two(), whole["quantrecipe", name], kernel="int_mm")


@pytest.mark.parametrize("name", ["int4", "int4-zeros", "nf4"])
@pytest.mark.parametrize("converter", ["streaming", "reference"])
def test_packed_codes_are_a_source_too(
    name: str, converter: str, source: Path, whole: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    document = recipe(source="quantrecipe", target="int8-scaled",
                      rules=[{"modules": ["a"], "scheme": "all"}])  # fmt: skip
    out = tmp_path / "out"
    convert(parsed(document), whole["quantrecipe", name], out, converter=converter, block_bytes=1)
    state, weights = load_state_dict(out), meant(source, name)
    stored = quantize(weights["a"], parsed(document).schemes["all"].weight)
    expected = dequantize(stored.codes, stored.scale, parsed(document).schemes["all"].weight)
    assert torch.equal(state["a.weight"], expected)
    assert torch.equal(state["b.weight"], weights["b"].bfloat16())
    assert not verify(out, against=whole["quantrecipe", name]).problems


def test_what_is_kept_is_kept_byte_for_byte(
    whole: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    layout = "compressed-tensors"
    document = recipe(source=layout, target=layout, rules=[], schemes={},
                      target_fields={"passthrough_dtype": "keep"})  # fmt: skip
    out = tmp_path / "out"
    convert(parsed(document), whole[layout, "int4-zeros"], out)
    before = load_file(whole[layout, "int4-zeros"] / "model.safetensors")
    after = load_file(next(out.glob("*.safetensors")))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_codes_that_are_packed_otherwise_are_carried_over(
    whole: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = whole["compressed-tensors", "int4-zeros"]
    document = recipe(source="compressed-tensors", target="quantrecipe", rules=[], schemes={},
                      target_fields={"passthrough_dtype": "keep"})  # fmt: skip
    convert(parsed(document), source, tmp_path / "out")
    before, after = load_state_dict(source), load_state_dict(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("spec", "layout", "features", "message"),
    [
        (SPECS["nf4"], "compressed-tensors", 64, "has no place for nf4"),
        (SPECS["int4"], "int8-scaled", 64, "has no place for int4"),
        (SPECS["nf4"], "quantrecipe", 12, "12 input features are no multiple of block_size 64"),
        (SPECS["int4"] | {"group_size": 5}, "quantrecipe", 12, "no multiple of group_size 5"),
        (
            SPECS["int4"] | {"group_size": 4},
            "quantrecipe",
            12,
            "do not fill int32 numbers of 8 codes",
        ),
    ],
)
def test_what_has_no_place_is_refused_before_anything_is_written(
    spec: Json, layout: str, features: int, message: str, tmp_path: Path
) -> None:
    save(tmp_path / "in" / "model.safetensors", {"a.weight": torch.ones(4, features)})
    with pytest.raises(InvalidInput, match=message):
        convert(parsed(recipe(spec, target=layout)), tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_standalone_loader_is_refused(source: Path, tmp_path: Path) -> None:
    document = recipe(SPECS["int4"], target="quantrecipe", target_fields={"emit_loader": True})
    with pytest.raises(
        InvalidInput, match="the loader beside the checkpoint reads codes of whole bytes"
    ):
        convert(parsed(document), source, tmp_path / "out")


def test_a_shape_that_is_another_is_refused(
    whole: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    tensors = load_file(whole["compressed-tensors", "int4"] / "model.safetensors")
    tensors["a.weight_shape"][1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with (
        open_checkpoint(tmp_path, layout="compressed-tensors") as checkpoint,
        pytest.raises(InvalidInput, match=r"it says \[20, 129\]"),
    ):
        checkpoint.weight("a")


def test_the_config_names_every_module(whole: dict[tuple[str, str], Path]) -> None:
    config = json.loads((whole["compressed-tensors", "int4-zeros"] / "config.json").read_text())
    found = config["quantization_config"]
    assert (found["quant_method"], found["format"]) == ("compressed-tensors", "pack-quantized")
    assert found["config_groups"]["group_0"]["targets"] == ["a", "b"]
    assert found["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16,
        "dynamic": False,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["int4", "int4-zeros"])
def test_compressed_tensors_reads_the_same_numbers(
    name: str, source: Path, whole: dict[tuple[str, str], Path]
) -> None:
    """Its own package: the configuration is applied, and its decompressor gives the weights."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    folder, weights = whole["compressed-tensors", name], meant(source, name)
    tensors = load_file(folder / "model.safetensors")
    document = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(document).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(document["format"])
    for module, weight in weights.items():
        mine = {
            key.removeprefix(f"{module}."): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{module}.weight")
        }
        found = compressor.decompress(mine, scheme)["weight"]
        # It multiplies in the dtype of the scales.
        torch.testing.assert_close(found, weight.to(found.dtype), rtol=0, atol=0)
