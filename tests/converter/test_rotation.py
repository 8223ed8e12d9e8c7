"""Rotated modules: converted, proven, loaded, and refused where nothing would say of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantrecipe.converter import convert, plan
from quantrecipe.converter.protocol import Converter
from quantrecipe.converter.selection import check_capabilities, find_converter
from quantrecipe.evaluate import verify
from quantrecipe.formats import dequantize, quantize
from quantrecipe.formats.rotation import rotate_
from quantrecipe.loaders import QuantizedLinear, load_model, load_state_dict, open_checkpoint
from quantrecipe.schema.plan_metadata import METADATA_KEY
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.registry import resolve_layout
from quantrecipe.schema.schemes import Hadamard, Int8Channel
from tests.converter.making import (
    Json,
    numbers,
    parsed,
    read_lock,
    recipe,
    result_of,
    save,
    save_statistics,
    weight_spec,
)
from tests.converter.using_loader import loader_of
from tests.evaluate.tampering import edit_lock, edit_tensor

SHAPES = {"a": (7, 32), "b": (5, 64), "c": (3, 6)}
TOKEN = {"format": "int8", "granularity": "token", "dynamic": True}
CHANNEL = Int8Channel(format="int8", granularity="channel")


def document(size: int = 16, *, smoothed: bool = False, **fields: object) -> Json:
    """Two modules rotated, and one too narrow for it protected."""
    scheme: Json = {
        "weight": fields.pop("weight", weight_spec("int8")),
        "activation": TOKEN,
        "rotation": {"kind": "hadamard", "size": size},
    }
    if smoothed:
        scheme["smoothing"] = {
            "kind": "smoothquant",
            "alpha": 0.5,
            "apply": "online",
            "statistics": "statistics.safetensors",
        }
    made: Json = {
        "schemes": {"all": scheme},
        "protected": [{"modules": ["c"], "dtype": "bfloat16", "reason": "narrow"}],
        "target": "quantrecipe",
        "target_fields": {"emit_loader": True},
    }
    return recipe(**(made | fields))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    tensors = {f"{name}.weight": numbers(rng, *shape).float() for name, shape in SHAPES.items()}
    tensors["a.bias"] = torch.linspace(-1, 1, 7)
    maxima = {
        name: torch.from_numpy(2.0 ** rng.uniform(-3, 5, (2, shape[1]))).float()
        for name, shape in SHAPES.items()
    }
    save_statistics(tmp_path / "statistics.safetensors", "model", maxima)
    return save(tmp_path / "source" / "model.safetensors", tensors, {"format": "pt"}).parent


def made(source: Path, value: Json, name: str = "out", **options: object) -> Path:
    path = source.parent / "recipe.json"
    path.write_text(json.dumps(value), "utf-8")
    return convert(path, source, source.parent / name, **options).out  # type: ignore[arg-type]


def factors(out: Path, name: str) -> Tensor | None:
    return load_file(out / "model.safetensors").get(f"{name}.smoothing")


def codes_by_definition(source: Path, out: Path, name: str, size: int) -> tuple[Tensor, Tensor]:
    weight, smoothing = (
        load_file(source / "model.safetensors")[f"{name}.weight"],
        factors(out, name),
    )
    smoothed = weight if smoothing is None else weight * smoothing
    stored = quantize(rotate_(smoothed.clone(), size), CHANNEL)
    assert stored.scale is not None
    return stored.codes, stored.scale


@pytest.mark.parametrize("smoothed", [False, True])
def test_codes_are_those_of_the_rotated_weight(source: Path, smoothed: bool) -> None:
    out = made(source, document(smoothed=smoothed))
    tensors = load_file(out / "model.safetensors")
    for name in ("a", "b"):
        assert (factors(out, name) is not None) == smoothed
        codes, scale = codes_by_definition(source, out, name, 16)
        assert torch.equal(tensors[f"{name}.weight"], codes)
        assert torch.equal(tensors[f"{name}.weight_scale"], scale)


@pytest.mark.parametrize("weight", ["channel", "tensor"])
def test_every_converter_and_block_size_writes_the_same_bytes(source: Path, weight: str) -> None:
    value = document(weight=weight_spec("int8", weight), smoothed=True)
    expected = result_of(made(source, value, "reference", converter="reference"))
    for block_bytes in (1, 600, None):
        options = {} if block_bytes is None else {"block_bytes": block_bytes}
        out = made(source, value, f"streaming-{block_bytes}", **options)
        assert result_of(out) == expected


@pytest.mark.parametrize("smoothed", [False, True])
def test_what_is_loaded_is_near_the_source_in_its_own_basis(source: Path, smoothed: bool) -> None:
    out = made(source, document(smoothed=smoothed))
    found, wanted = load_state_dict(out), load_file(source / "model.safetensors")
    for name in ("a", "b"):
        codes, scale = codes_by_definition(source, out, name, 16)
        back = rotate_(dequantize(codes, scale, CHANNEL), 16)
        smoothing = factors(out, name)
        back = back if smoothing is None else back / smoothing
        assert torch.equal(found[f"{name}.weight"], back)
        # Half a step of each of 16 numbers, spread by entries of 1/4.
        error = (back - wanted[f"{name}.weight"]) * (1 if smoothing is None else smoothing)
        assert (error.abs() <= scale / 2 * 4 * 1.001).all()


def model_of(source: Path) -> nn.Module:
    """A plain model with the source's weights."""
    tensors = load_file(source / "model.safetensors")
    model = nn.Module()
    for name, (out_features, in_features) in SHAPES.items():
        bias = f"{name}.bias" in tensors
        model.add_module(name, nn.Linear(in_features, out_features, bias=bias))
    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("how", ["load_model", "beside the weights"])
def test_loaded_modules_compute_what_the_source_does(
    source: Path, smoothed: bool, how: str
) -> None:
    out = made(source, document(smoothed=smoothed))
    plain, model = model_of(source), model_of(source)
    if how == "load_model":
        load_model(model, out)
        module = model.get_submodule("a")
        assert isinstance(module, QuantizedLinear)
        assert module.rotation == Hadamard(kind="hadamard", size=16)
        assert "rotation=hadamard of 16" in repr(module)
    else:
        loader = loader_of(out)
        model = loader.load(model, dtype=None)
        state = loader.state_dict()
        for name, tensor in load_state_dict(out).items():
            assert torch.equal(state[name], tensor), name
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        x = torch.randn(9, SHAPES[name][1], generator=generator)
        exact = plain.get_submodule(name)(x)
        codes, scale = codes_by_definition(source, out, name, 16)
        smoothing = factors(out, name)
        rows = rotate_(x.clone() if smoothing is None else x / smoothing, 16).double()
        weight = dequantize(codes, scale, CHANNEL).double()
        s_x = rows.abs().amax(1, keepdim=True) / 127
        bound = (scale.T * rows.abs().sum(1, keepdim=True) + s_x * weight.abs().sum(1)) / 2
        bound = bound + x.shape[1] * s_x * scale.T
        error = (model.get_submodule(name)(x) - exact).abs().double()
        assert (error <= bound * 1.001 + 1e-6).all(), (error / bound).max()
        assert error.max() > 0


def test_gradients_are_those_of_the_weight_in_its_own_basis(source: Path) -> None:
    out = made(source, document(smoothed=True))
    model = model_of(source)
    load_model(model, out)
    x = torch.randn(3, 32, requires_grad=True)
    model.get_submodule("a")(x).sum().backward()
    expected = load_state_dict(out)["a.weight"].sum(0).expand(3, -1)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_verify_proves_every_bound_in_the_rotated_basis(source: Path) -> None:
    out = made(source, document(smoothed=True))
    found = verify(out, against=source)
    assert found.problems == ()
    assert {module.name for module in found.measured} == {"a", "b"}
    assert all(0 < module.of_bound <= 1 for module in found.measured)

    def spoil(content: bytearray) -> None:
        content[40] = (content[40] + 5) % 256

    edit_tensor(out, "b.weight", spoil)
    kinds = {problem.kind for problem in verify(out, against=source).problems}
    assert kinds >= {"bound-broken"}


def test_verify_holds_the_rotation_of_the_lock_to_its_recipe(source: Path) -> None:
    out = made(source, document())

    def drop(lock: Json) -> None:
        del lock["modules"][0]["rotation"]

    edit_lock(out, drop)
    found = {(problem.kind, problem.pointer) for problem in verify(out).problems}
    assert ("not-the-plan", "/modules/0/rotation") in found


def test_lock_and_config_say_it(source: Path) -> None:
    out = made(source, document(64, protected=[], rules=[{"modules": ["b"], "scheme": "all"}]))
    rotation = {"kind": "hadamard", "size": 64}
    assert [module.get("rotation") for module in read_lock(out)["modules"]] == [
        None,
        rotation,
        None,
    ]
    config = json.loads((out / "config.json").read_text("utf-8"))["quantization_config"]
    assert config["schemes"]["all"]["rotation"] == rotation


@pytest.mark.parametrize("without", ["lock", "lock and recipe"])
def test_a_file_without_its_lock_still_says_it(source: Path, without: str) -> None:
    out = made(source, document())
    expected = load_state_dict(out)
    (out / "recipe.lock.json").unlink()
    layout = None
    if without == "lock and recipe":  # as a library saves it
        tensors = load_file(out / "model.safetensors")
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        layout = "quantrecipe"
    with open_checkpoint(out, layout=layout) as checkpoint:
        for name in ("a", "b"):
            assert torch.equal(checkpoint.weight(name), expected[f"{name}.weight"])


def test_it_is_not_opened_as_if_it_were_not_rotated(source: Path) -> None:
    out = made(source, document())
    alone = shutil.copy(out / "model.safetensors", source.parent / "alone.safetensors")
    with pytest.raises(InvalidInput, match="stored rotated"):
        open_checkpoint(alone, layout="int8-scaled")


def test_a_rotated_source_is_rotated_back(source: Path, tmp_path: Path) -> None:
    out = made(source, document())
    value = recipe(source="quantrecipe", target="plain", schemes={}, rules=[])
    value["target"]["passthrough_dtype"] = "float32"
    convert(parsed(value), out, tmp_path / "plain")
    before, after = load_state_dict(out), load_state_dict(tmp_path / "plain")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_rotated_source_of_unknown_modules_is_refused(source: Path) -> None:
    out = made(source, document())
    folder = source.parent / "again"
    folder.mkdir()
    tensors = load_file(out / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", _metadata(out / "model.safetensors"))
    value = recipe(source="quantrecipe", target="plain", schemes={}, rules=[])
    with pytest.raises(InvalidInput) as refused:
        plan(parsed(value), folder)
    assert [problem.kind for problem in refused.value.problems] == ["rotated-source"]


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata()
    assert METADATA_KEY in found
    return found


@pytest.mark.parametrize("layout", ["int8-scaled", "transformerlab"])
def test_a_layout_that_cannot_say_it_refuses_it(source: Path, layout: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        plan(parsed(document(target=layout)), source)
    (problem,) = refused.value.problems
    assert problem.kind == "target-cannot-hold"
    assert problem.pointer == "/schemes/all/rotation"
    assert "'quantrecipe'" in (problem.hint or "")


@pytest.mark.parametrize(
    ("changes", "kind", "pointer"),
    [
        ({"protected": []}, "shape-refused", "/schemes/all/rotation/size"),
        ({"weight": {"format": "float16"}}, "target-cannot-hold", "/schemes/all/rotation"),
    ],
)
def test_what_cannot_be_rotated_is_refused(
    source: Path, changes: Json, kind: str, pointer: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        plan(parsed(document(**changes)), source)
    assert {(each.kind, each.pointer) for each in refused.value.problems} == {(kind, pointer)}


def test_only_the_layout_with_a_config_holds_it() -> None:
    for name in ("fp8-scaled", "int8-scaled", "plain", "transformerlab"):
        held = resolve_layout(name).holds.values()
        assert not any(each.rotation for each in held), name
    assert all(each.rotation for each in resolve_layout("quantrecipe").holds.values())


def test_a_converter_that_cannot_rotate_is_refused() -> None:
    class Plain:
        name, version, convert = "plain", "1", None
        capabilities = replace(find_converter("streaming").capabilities, rotations=frozenset())

    made: Converter = Plain()  # type: ignore[assignment]
    with pytest.raises(InvalidInput) as refused:
        check_capabilities(parsed(document()), made)
    (problem,) = refused.value.problems
    assert problem.message == "converter 'plain' has no rotation hadamard"
    assert problem.pointer == "/schemes/all/rotation/kind"
    assert "streaming" in (problem.hint or "")
