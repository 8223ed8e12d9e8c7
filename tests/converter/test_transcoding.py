"""Carrying checkpoints over without a recipe: every layout into every other that holds the same."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantrecipe.evaluate import verify
from quantrecipe.loaders import open_checkpoint
from quantrecipe.schema.layout_reading import SCALED_FORMATS, StoredModule
from quantrecipe.schema.nearest import NEAREST, Wanted, nearest
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.registry import layout_names, named_layout
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.tensors import TensorInfo
from tests.converter.making import Json, parsed, raw, save, tree
from tests.converter.transcoding import (
    FORMATS,
    held_by,
    inferred_for,
    made,
    over,
    recipe_for,
    tensor_bytes,
    transfers,
)

CODED = [name for name in layout_names() if name != "plain" and not name.startswith("gguf")]
SHARED = {
    (one, other): sorted(set(held_by(one)) & set(held_by(other)))
    for one, other in itertools.permutations(CODED, 2)
}
PAIRS = [pair for pair, names in SHARED.items() if names]
SMOOTHED = [
    name
    for name in CODED
    if any("online" in each.smoothing for each in named_layout(name).holds.values())
]
SECOND = ("weight_scale_2", "second_scale", "weight_global_scale")


def ids(pair: tuple[str, str]) -> str:
    return "-to-".join(pair)


Sources = Callable[[str, list[str]], Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """A checkpoint in a layout, with modules stored in these ways; each is made once."""

    @cache
    def make(layout: str, names: tuple[str, ...]) -> Path:
        return made(layout, tmp_path_factory.mktemp("source"), names)

    return lambda layout, names: make(layout, tuple(names))


def numbers_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """By module what its weight is made of, in the order of memory."""
    found: dict[str, dict[str, Tensor]] = {}
    with open_checkpoint(folder) as opened:
        for part, contents in opened.parts.items():
            for name, module in contents.modules.items():
                if not isinstance(module.weight, ScaledWeight):
                    continue
                rows = opened.stored(name, part)
                mine = {"codes": rows.codes(0, module.out_features).clone()}
                zeros, factors = rows.zeros(0, module.out_features), rows.factors()
                mine |= {} if zeros is None else {"zeros": zeros.clone()}
                mine |= {} if factors is None else {"factors": factors.clone()}
                if module.weight.has_two_levels:
                    levels = rows.two_levels()
                    mine |= {"scales": levels.scale, "second": levels.second}
                    mine |= {} if levels.offset is None else {"offset": levels.offset}
                else:
                    mine["scales"] = rows.scales(0, module.out_features).clone()
                if "bias" in module.tensors:
                    mine["bias"] = opened.tensor(module.tensors["bias"])
                mine["rotation"] = torch.tensor(module.rotation.size if module.rotation else 0)
                found[name] = mine
    return found


def assert_same_numbers(one: Path, other: Path, names: list[str], planned: Plan) -> None:
    before, after = numbers_of(one), numbers_of(other)
    done = transfers(planned)
    for name in names:
        mine, its = before[f"layers.0.{name}"], after[f"layers.0.{name}"]
        assert mine.keys() == its.keys()
        for role, tensor in mine.items():
            if role == "second" and done[name] == "inverted":
                # 1 by a number, rounded twice at the most.
                assert torch.allclose(tensor, its[role], rtol=2.0**-22, atol=0)
            else:
                assert (tensor.shape, raw(tensor)) == (its[role].shape, raw(its[role])), (
                    name,
                    role,
                )


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
def test_what_two_layouts_hold_goes_there_and_back_bit_for_bit(
    pair: tuple[str, str], sources: Sources, tmp_path: Path
) -> None:
    (one, other), names = pair, SHARED[pair]
    source = sources(one, names)
    planned = over(source, other, tmp_path / "there")
    for name, how in transfers(planned).items():
        inverts = name == "nvfp4" and "compressed-tensors" in pair
        assert how == ("inverted" if inverts else "lossless"), name
    assert_same_numbers(source, tmp_path / "there", names, planned)
    over(source, other, tmp_path / "whole", converter="reference")
    assert tensor_bytes(tmp_path / "whole") == tensor_bytes(tmp_path / "there")
    assert not verify(tmp_path / "there", against=source).problems

    again = over(tmp_path / "there", one, tmp_path / "back")
    assert set(transfers(again).values()) <= {"lossless", "inverted"}
    before, after = tensor_bytes(source), tensor_bytes(tmp_path / "back")
    assert before.keys() == after.keys()
    for tensor, found in before.items():
        # What is divided into 1 twice may come back one rounding away.
        if transfers(planned).get("nvfp4") != "inverted" or not tensor.endswith(SECOND):
            assert after[tensor] == found, tensor


def smoothed(folder: Path) -> Path:
    """int8 by rows with factors that activations are divided by."""
    rng = np.random.default_rng(4)
    tensors = {
        "layers.0.a.weight": torch.from_numpy(rng.integers(-127, 128, (8, 16), dtype=np.int8)),
        "layers.0.a.weight_scale": torch.from_numpy(rng.random((8, 1)) + 0.5).float(),
        "layers.0.a.smoothing": torch.from_numpy(rng.random(16) + 0.5).float(),
    }
    save(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("pair", [*itertools.permutations(SMOOTHED, 2)], ids=ids)
def test_smoothing_factors_go_along(pair: tuple[str, str], tmp_path: Path) -> None:
    one, other = pair
    start = smoothed(tmp_path / "start")
    if one != "int8-scaled":
        over(start, one, tmp_path / "one")
        start = tmp_path / "one"
    planned = over(start, other, tmp_path / "there")
    assert transfers(planned) == {"a": "lossless"}
    if one != "int8-scaled":
        assert_same_numbers(start, tmp_path / "there", ["a"], planned)
        assert not verify(tmp_path / "there", against=start).problems
    over(tmp_path / "there", one, tmp_path / "back")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(start)


def test_one_scale_becomes_one_for_each_row(tmp_path: Path) -> None:
    folder = made("comfyui", tmp_path, ["int8_tensor", "e4m3_tensor"])
    planned = over(folder, "torchao", tmp_path / "there")
    assert set(transfers(planned).values()) == {"lossless"}
    source = load_file(folder / "model.safetensors")
    target = load_file(tmp_path / "there" / "model.safetensors")
    name = "layers.0.int8_tensor"
    assert torch.equal(source[f"{name}.weight"], target[f"{name}._weight_qdata"])
    assert target[f"{name}._weight_scale"].shape == (160, 1)
    assert (target[f"{name}._weight_scale"] == source[f"{name}.weight_scale"]).all()
    assert not verify(tmp_path / "there", against=folder).problems


def test_the_recipe_says_all_there_is_to_know(tmp_path: Path) -> None:
    source = smoothed(tmp_path / "source")
    inferred = inferred_for(source, "transformerlab")
    over(source, "transformerlab", tmp_path / "out")
    assert json.loads((tmp_path / "out/recipe.json").read_text()) == json.loads(inferred.text)
    assert inferred.text == inferred_for(source, "transformerlab").text
    rule = json.loads(inferred.text)["rules"]
    assert rule == [{"modules": ["layers.*.a"], "scheme": "int8-channel", "count": 1}]


REFUSED: dict[str, tuple[str, str, Json, str, list[str]]] = {
    "rotation without a place": (
        "rotated", "torchao", {}, "needs-requantizing",
        ["rotated (hadamard of 16)", "'torchao'", "comfyui and quantrecipe hold", "--requantize"],
    ),
    "smoothing without a place": (
        "smoothed", "comfyui", {}, "needs-requantizing",
        ["it is stored smoothed", "'comfyui'", '"apply": "fold"'],
    ),
    "a format that is not held": (
        "rotated", "torchao", {"wanted": "nf4", "requantize": True}, "target-cannot-hold",
        ["no place for nf4", "It holds: int8:channel, float8_e4m3fn:channel"],
    ),
    "a granularity that is not held": (
        "rotated", "torchao", {"wanted": "int8:tensor"}, "target-cannot-hold",
        ["no place for int8:tensor"],
    ),
    "a GGUF file of nothing": (
        "smoothed", "gguf", {"requantize": True}, "no-architecture", ["--architecture flux"],
    ),
    "names that nobody knows": (
        "smoothed", "quantrecipe", {"names": "ideogram4-orginal"}, "unknown-names",
        ["ideogram4-original"],
    ),
    "a layout that nobody knows": ("smoothed", "comfy", {}, "unknown-layout", ["comfyui"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_what_would_work(case: str, tmp_path: Path) -> None:
    kind, layout, asked, problem, says = REFUSED[case]
    source = smoothed(tmp_path / "source")
    if kind == "rotated":
        source = made("comfyui", tmp_path, ["int8_rotated"])
    before = tree(tmp_path)
    with pytest.raises(InvalidInput) as refused:
        inferred_for(source, layout, **asked)
    assert refused.value.problems[0].kind == problem
    for text in says:
        assert text in str(refused.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["rotated", "smoothed"])
def test_requantizing_undoes_what_has_no_place(kind: str, tmp_path: Path) -> None:
    source = smoothed(tmp_path / "source")
    if kind == "rotated":
        source = made("comfyui", tmp_path, ["int8_rotated"])
    planned = over(source, "vllm-omni", tmp_path / "out", requantize=True)
    over(source, "vllm-omni", tmp_path / "whole", requantize=True, converter="reference")
    assert tensor_bytes(tmp_path / "whole") == tensor_bytes(tmp_path / "out")
    done = [module for module in planned.modules if isinstance(module.weight, ScaledWeight)]
    assert [module.transfer for module in done] == ["requantized"]
    assert "smoothing" not in done[0].outputs
    assert done[0].rotation is None
    assert not verify(tmp_path / "out", against=source).problems


def module_of(name: str) -> StoredModule:
    weight = parsed(recipe_for("plain", {name: {"weight": FORMATS[name]}}, "plain")).schemes[name]
    info = TensorInfo("m.weight", "int8", (64, 128), Path("x"), 0, 64 * 128)
    return StoredModule("m", 64, 128, weight.weight, {"weight": info})


@pytest.mark.parametrize(
    ("name", "layout", "wanted", "found"),
    [
        ("int8_group", "torchao", None, "int8 channel"),
        ("int8_channel", "bitsandbytes", None, "llm_int8 channel"),
        ("int8_channel", "fp8-scaled", None, "float8_e4m3fn channel"),
        ("int8_channel", "gguf", None, "q8_0 block"),
        ("e4m3_block", "torchao", None, "float8_e4m3fn channel"),
        ("e4m3_channel", "comfyui", None, "float8_e4m3fn tensor"),
        ("e5m2_tensor", "compressed-tensors", None, "float8_e4m3fn tensor"),
        ("e4m3_tensor", "vllm-omni", None, "int8 channel"),
        ("llm_int8", "sdnq", None, "int8 channel"),
        ("int4", "bitsandbytes", None, "llm_int8 channel"),
        ("int4", "bitsandbytes", Wanted("nf4"), "nf4 block"),
        ("int4", "gguf", None, "q4_0 block"),
        ("nf4", "compressed-tensors", None, "int8 channel"),
        ("nf4", "compressed-tensors", Wanted("int4"), "int4 group"),
        ("mxfp4", "comfyui", None, "nvfp4 group"),
        ("nvfp4", "fp8-scaled", None, "float8_e4m3fn block"),
        ("q8_0", "quantrecipe", None, "int8 group"),
        ("q8_0", "quantrecipe", Wanted("int8", "channel"), "int8 channel"),
        ("q4_0", "compressed-tensors", None, "int4 group"),
        ("int8_channel", "plain", None, None),
    ],
)
def test_the_nearest_that_a_layout_holds(
    name: str, layout: str, wanted: Wanted | None, found: str | None
) -> None:
    weight = nearest(named_layout(layout), module_of(name), wanted)
    assert (None if weight is None else f"{weight.format} {weight.granularity}") == found


def test_nothing_is_stored_in_fewer_bits() -> None:
    bits = {"int4": 4, "nf4": 4, "mxfp4": 4, "nvfp4": 4, "q4_0": 4, "q4_k": 4, "q6_k": 6}
    assert set(NEAREST) == set(SCALED_FORMATS)
    for name, others in NEAREST.items():
        assert others[0] == name
        assert len(set(others)) == len(others)
        assert all(bits.get(other, 8) >= bits.get(name, 8) for other in others)


def test_the_order_is_documented() -> None:
    page = Path(__file__).parents[2] / "docs" / "transcoding.md"
    rows = [line for line in page.read_text("utf-8").splitlines() if line.startswith("| `")]
    said = {}
    for row in rows:
        first, *others = re.findall(r"`([a-z0-9_]+)`", row)
        said[first] = tuple(others)
    assert {name: others for name, others in said.items() if name in NEAREST} == dict(NEAREST)


def test_several_parts_go_where_each_has_its_place(tmp_path: Path) -> None:
    for part in ("transformer", "text_encoder"):
        smoothed(tmp_path / "source" / part)
    planned = over(tmp_path / "source", "quantrecipe", tmp_path / "apart")
    assert [file.path for file in planned.files] == [
        "text_encoder/model.safetensors",
        "transformer/model.safetensors",
    ]
    together = over(tmp_path / "apart", "transformerlab", tmp_path / "together")
    assert [file.path for file in together.files] == ["model.safetensors"]
    names = load_file(tmp_path / "together/model.safetensors")
    assert "text_encoder.layers.0.a.wq" in names
    over(tmp_path / "together", "quantrecipe", tmp_path / "again")
    assert tensor_bytes(tmp_path / "again") == tensor_bytes(tmp_path / "apart")
    assert not verify(tmp_path / "again", against=tmp_path / "together").problems


def test_a_gguf_file_of_one_part_has_no_prefix(tmp_path: Path) -> None:
    source = made("quantrecipe", tmp_path, ["int8_channel"])
    planned = over(source, "gguf", tmp_path / "out", architecture="flux")
    assert [file.path for file in planned.files] == ["model.gguf"]
    assert {tensor.name for tensor in planned.tensors()} >= {"layers.0.int8_channel.weight"}
    assert planned.target_layout.metadata["general.architecture"] == "flux"
    assert not verify(tmp_path / "out", against=source).problems
    again = over(tmp_path / "out", "gguf", tmp_path / "again")
    assert {module.transfer for module in again.modules} == {"lossless"}
    assert again.target_layout.metadata["general.architecture"] == "flux"


ACTIVATIONS: dict[str, tuple[str, Json | None]] = {
    "nothing said": ("int8-scaled", None),
    "vllm-omni": (
        "vllm-omni",
        {"quant_method": "int8", "activation_scheme": "dynamic", "ignored_layers": []},
    ),
    "compressed-tensors": (
        "compressed-tensors",
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {
                    "targets": ["re:.*layers\\..*"],
                    "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
                    "input_activations": {
                        "num_bits": 8, "type": "int", "strategy": "token", "dynamic": True,
                    },
                }
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations_are_those_that_the_source_says(case: str, tmp_path: Path) -> None:
    layout, config = ACTIVATIONS[case]
    source = smoothed(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["layers.0.a.smoothing"]
    save(source / "model.safetensors", tensors)
    if config is not None:
        (source / "config.json").write_text(json.dumps({"quantization_config": config}))
    inferred = inferred_for(source, "quantrecipe")
    assert inferred.recipe.source.layout == layout
    (scheme,) = inferred.recipe.schemes.values()
    assert (scheme.activation is None) == (config is None)
    # What is written says it too, in the config of the next layout.
    over(source, "quantrecipe", tmp_path / "out")
    (tmp_path / "out" / "recipe.lock.json").unlink()
    for target in ("torchao", "compressed-tensors"):
        over(tmp_path / "out", target, tmp_path / target)
        (again,) = inferred_for(tmp_path / target, "vllm-omni").recipe.schemes.values()
        assert again.activation == scheme.activation


def test_what_no_recipe_can_say_of_activations_is_noted(tmp_path: Path) -> None:
    source = smoothed(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["layers.0.a.smoothing"]
    save(source / "model.safetensors", tensors)
    inputs = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": group}}
    (source / "config.json").write_text(json.dumps({"quantization_config": config}))
    inferred = inferred_for(source, "quantrecipe")
    (scheme,) = inferred.recipe.schemes.values()
    assert scheme.activation is None
    (note,) = inferred.notes
    assert note == (
        "its config.json has activations quantized in a way that no recipe says (static, 8 bits by "
        "tensor): they are left plain"
    )
