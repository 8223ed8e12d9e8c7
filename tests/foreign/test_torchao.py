"""Files of torchao are read, and torchao, transformers and diffusers read ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantrecipe.converter import convert
from quantrecipe.loaders import load_state_dict, open_checkpoint
from quantrecipe.schema.problems import InvalidInput
from tests.converter.making import Json, parsed
from tests.loaders.converted import TOKEN, converted, fragment, library
from tests.support.goldens import same
from tests.support.peer_models import (
    FILE,
    PROJECTIONS,
    assert_loaded,
    assert_read,
    expected,
    golden,
    kept,
    llama,
    metadata,
    small,
    written,
)

GOLDENS = ["int8-w8a8", "int8-weight-only", "fp8-weight-only", "nvfp4-weight-only"]
INT8: Json = {"format": "int8", "granularity": "channel"}
FP8: Json = {"format": "float8_e4m3fn", "granularity": "channel"}
NVFP4: Json = {"format": "nvfp4", "granularity": "group"}
# The scheme, and what torchao calls its config and its tensors.
SCHEMES: dict[str, tuple[Json, Json | None, str, str]] = {
    "int8-w8a8": (INT8, TOKEN, "Int8DynamicActivationInt8WeightConfig", "Int8Tensor"),
    "int8": (INT8, None, "Int8WeightOnlyConfig", "Int8Tensor"),
    "fp8": (FP8, None, "Float8WeightOnlyConfig", "Float8Tensor"),
    "nvfp4": (NVFP4, None, "NVFP4WeightOnlyConfig", "NVFP4Tensor"),
}
# The rows of w3 fill more than one tile of scales, but no block of 16 columns.
MODULES = {"int8-w8a8": "o w1 w2", "int8": "o w1 w2", "fp8": "o w1 w2", "nvfp4": "o w1"}
schemes = pytest.mark.parametrize("name", list(SCHEMES))
with_peers = pytest.mark.xdist_group("diffusers")


@pytest.fixture
def peer() -> Any:
    """Torchao's own reader of its files, imported when a test runs."""
    return library("torchao.prototype.safetensors.safetensors_support")


@pytest.fixture
def transformers(peer: Any) -> Iterator[Any]:
    found = library("transformers")
    library("accelerate")
    library("torchao.prototype.mx_formats")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    yield found
    found.logging.set_verbosity_warning()


# ---- what torchao wrote


@pytest.mark.parametrize("name", GOLDENS)
def test_files_of_torchao_mean_what_it_says(name: str, tmp_path: Path) -> None:
    folder = golden(f"torchao-{name}", tmp_path / "theirs")
    assert_read(folder, "torchao", expected(f"torchao-{name}"))


@pytest.mark.parametrize("name", GOLDENS[1:])
def test_what_is_kept_is_written_as_torchao_wrote_it(name: str, tmp_path: Path) -> None:
    theirs = golden(f"torchao-{name}", tmp_path / "theirs")
    ours = kept(theirs, "torchao", tmp_path / "ours")
    before, after = load_file(theirs / FILE), load_file(ours / FILE)
    assert before.keys() == after.keys()
    assert all(same(before[key], after[key]) for key in before)
    said, written_now = metadata(theirs), metadata(ours)
    names = json.loads(said.pop("tensor_names"))
    assert sorted(json.loads(written_now["tensor_names"])) == sorted(names)
    for key in names:
        assert json.loads(written_now[key]) == json.loads(said[key]), key
    mine = json.loads((ours / "config.json").read_text("utf-8"))["quantization_config"]
    config = json.loads((theirs / "config.json").read_text("utf-8"))["quantization_config"]
    assert mine | {"modules_to_not_convert": None} == config | {"modules_to_not_convert": None}


def test_a_scale_of_activations_that_weights_rely_on_is_refused(tmp_path: Path) -> None:
    folder = golden("torchao-int8-w8a8", tmp_path / "theirs")
    tensors = load_file(folder / FILE)
    tensors["layers.0.attention.o._weight_act_pre_scale"] = torch.ones(64)
    save_file(tensors, folder / FILE, metadata(folder))
    with pytest.raises(InvalidInput, match="changes what the weight of"):
        open_checkpoint(folder, layout="torchao")


def test_tensors_of_another_class_are_refused(tmp_path: Path) -> None:
    """Codes with zero points that count have the same names and shapes."""
    folder = golden("torchao-int8-weight-only", tmp_path / "theirs")
    said = metadata(folder)
    key = "layers.0.attention.o.weight"
    said[key] = said[key].replace("Int8Tensor", "IntxUnpackedToInt8Tensor")
    save_file(load_file(folder / FILE), folder / FILE, said)
    with pytest.raises(InvalidInput, match="is of class IntxUnpackedToInt8Tensor"):
        open_checkpoint(folder, layout="torchao")


def test_files_without_zero_points_are_read(tmp_path: Path) -> None:
    """As versions wrote them that had none in tensors with symmetric scales."""
    folder = golden("torchao-int8-weight-only", tmp_path / "theirs")
    tensors = load_file(folder / FILE)
    save_file({key: each for key, each in tensors.items() if "zero_point" not in key},
              folder / FILE, metadata(folder))  # fmt: skip
    assert_read(folder, "torchao", expected("torchao-int8-weight-only"))


# ---- what torchao reads


def dense(layer: Any) -> Tensor:
    made: Tensor = layer.weight.dequantize()
    return made


@with_peers
@schemes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_torchao_reads_the_weights_that_we_read(
    name: str, dtype: torch.dtype, peer: Any, tmp_path: Path
) -> None:
    weight, activation, _, kind = SCHEMES[name]
    modules = MODULES[name].split()
    out = written(tmp_path, "torchao", weight, *modules, dtype=dtype, activation=activation)
    found, rest = peer.unflatten_tensor_state_dict(load_file(out / FILE), metadata(out))
    assert not rest
    state = load_state_dict(out, dtype=dtype)
    assert found.keys() == state.keys()
    quantized = {key for key, tensor in found.items() if type(tensor) is not Tensor}
    assert {key.split(".")[-2] for key in quantized} == set(modules)
    for key, tensor in found.items():
        if key in quantized:
            assert type(tensor).__name__ == kind
            assert (tensor.act_quant_kwargs is None) == (activation is None)
            assert tensor.dtype == dtype
            tensor = tensor.dequantize()
        assert same(tensor, state[key]), key


@with_peers
def test_tiles_of_scales_lie_as_torchao_lays_them(peer: Any, tmp_path: Path) -> None:
    """More than 128 rows, and columns that fill no tile of 4 blocks: filled up as torchao does."""
    library("torchao.prototype.mx_formats")
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    weight = torch.randn(129, 80, generator=torch.Generator().manual_seed(1))
    theirs = NVFP4Tensor.to_nvfp4(
        weight,
        per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()),
        is_swizzled_scales=True,
    )
    (tmp_path / "in").mkdir()
    save_file({"a.weight": weight}, tmp_path / "in" / FILE)
    out = converted(
        tmp_path / "in",
        tmp_path / "out",
        ["a"],
        NVFP4,
        activation=None,
        layout="torchao",
        file=FILE,
    )
    ours = load_file(out / FILE)
    for part, tensor in (
        ("qdata", theirs.qdata),
        ("scale", theirs.scale),
        ("per_tensor_scale", theirs.per_tensor_scale),
    ):
        assert same(ours[f"a._weight_{part}"], tensor), part


@with_peers
def test_tensors_without_a_dot_in_their_name_are_handed_on(peer: Any, tmp_path: Path) -> None:
    """Torchao splits every listed name at a dot."""
    folder = small(tmp_path / "in", "o")
    tensors = load_file(folder / FILE) | {"token": torch.ones(3)}
    save_file(tensors, folder / FILE)
    out = converted(
        folder,
        tmp_path / "out",
        ["layers.**.o"],
        INT8,
        activation=None,
        layout="torchao",
        file=FILE,
    )
    found, rest = peer.unflatten_tensor_state_dict(load_file(out / FILE), metadata(out))
    assert "token" not in found
    assert rest.keys() == {"token"}


@with_peers
@schemes
@pytest.mark.parametrize("shard", [None, "16KB"], ids=["one-file", "shards"])
def test_transformers_loads_and_computes(
    name: str, shard: str | None, transformers: Any, tmp_path: Path
) -> None:
    plain = llama(tmp_path / "in", transformers, tie_word_embeddings=shard is None)
    weight, activation, config, kind = SCHEMES[name]
    target: Json = {} if shard is None else {"max_shard_size": shard}
    out = converted(
        tmp_path / "in",
        tmp_path / "out",
        PROJECTIONS,
        weight,
        activation=activation,
        layout="torchao",
        file=FILE,
        **target,
    )
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard is not None)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    settings = model.config.quantization_config
    assert type(settings.quant_type).__name__ == config
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == kind
    # Rounding of activations to int8 comes on top of that of sums to bfloat16.
    assert_loaded(model, plain, out, dense, 0.03 if activation else 0.01)


@with_peers
@pytest.mark.parametrize("name", ["int8-w8a8", "fp8"])
def test_diffusers_loads_and_computes(name: str, transformers: Any, tmp_path: Path) -> None:
    diffusers = library("diffusers")
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    torch.manual_seed(0)
    kind = diffusers.SD3Transformer2DModel
    plain = kind(sample_size=4, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8,
                 num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
                 pooled_projection_dim=8, out_channels=4)  # fmt: skip
    plain.to(torch.bfloat16).eval().save_pretrained(tmp_path / "in")
    weight, activation, _, ao = SCHEMES[name]
    out = converted(
        tmp_path / "in",
        tmp_path / "out",
        ["transformer_blocks.**"],
        weight,
        activation=activation,
        layout="torchao",
        file="diffusion_pytorch_model.safetensors",
    )
    model = kind.from_pretrained(out, torch_dtype=torch.bfloat16)
    state = load_state_dict(out, dtype=torch.bfloat16)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantized = {n for n, m in layers.items() if type(m.weight).__name__ == ao}
    assert quantized == {n for n in layers if n.startswith("transformer_blocks")}
    assert "transformer_blocks.0.attn.to_q" in quantized
    for module in quantized:
        assert torch.equal(dense(layers[module]), state[f"{module}.weight"])
    plain.load_state_dict(state)
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, 4).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 3, 16).bfloat16(),
        "pooled_projections": torch.randn(1, 8).bfloat16(),
        "timestep": torch.tensor([3.0]).bfloat16(),
    }
    with torch.no_grad():
        wanted, found = plain(**inputs).sample, model(**inputs).sample
    assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()


@with_peers
def test_both_kinds_of_weights_in_one_file_are_told_apart(
    transformers: Any, tmp_path: Path
) -> None:
    """The config says one of them; the metadata of the file says it of each weight."""
    plain = llama(tmp_path / "in", transformers)
    document = {
        "kind": "recipe",
        "version": 1,
        "name": "mixed",
        "source": {"layout": "plain"},
        "schemes": {"whole": {"weight": INT8}, "small": {"weight": NVFP4}},
        "rules": [
            {"modules": ["model.layers.**.mlp.*"], "scheme": "small"},
            {"modules": PROJECTIONS, "scheme": "whole"},
        ],
        "target": {"layout": "torchao", "file": FILE},
    }
    out = convert(parsed(document), tmp_path / "in", tmp_path / "out").out
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert_loaded(model, plain, out, dense, 0.01)
    assert fragment(out)["modules_to_not_convert"] == ["lm_head", "model.embed_tokens"]
