"""Golden checkpoints of other programs, and small models that those programs load from ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantrecipe.converter import convert
from quantrecipe.evaluate import verify
from quantrecipe.loaders import load_state_dict, open_checkpoint
from tests.converter.making import Json, Tensors, parsed, recipe, result_of
from tests.support import goldens
from tests.support.goldens import GOLDEN, same, source

FILE = "model.safetensors"
IDS = torch.arange(7)[None]
PROJECTIONS = ["model.layers.**.*_proj"]


def golden(name: str, folder: Path, *without: str, config: bool = True) -> Path:
    """A golden checkpoint as a folder, less the modules that are named.

    Args:
        name: of its files.
        folder: where it goes.
        without: the ends of names of modules that are left out.
        config: copy its ``config.json`` too.
    """
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    kept = {
        key: tensor
        for key, tensor in load_file(path).items()
        if not any(f".{module}." in key for module in without)
    }
    folder.mkdir(parents=True)
    save_file(kept, folder / FILE, metadata)
    if config:
        (folder / "config.json").write_bytes((GOLDEN / f"{name}.config.json").read_bytes())
    return folder


def expected(name: str, *without: str) -> Tensors:
    """What its program takes the weights of a golden checkpoint for, by module."""
    found = goldens.expected(name)
    return {key: each for key, each in found.items() if key.rpartition(".")[2] not in without}


def assert_read(folder: Path, layout: str, wanted: Mapping[str, Tensor]) -> None:
    """A checkpoint means these weights, bit for bit, and else holds plain tensors of the source."""
    with open_checkpoint(folder, layout=layout) as checkpoint:
        stored = {
            name
            for name, module in checkpoint.part().modules.items()
            if "weight_scale" in module.tensors
        }
        assert stored == wanted.keys()
        for module, weight in wanted.items():
            assert same(checkpoint.weight(module, dtype=weight.dtype), weight), module
    state, before = load_state_dict(folder, layout=layout), source()
    for key, tensor in state.items():
        module, _, role = key.rpartition(".")
        if module not in wanted or role == "bias":
            assert same(tensor, before[key]), key


def kept(folder: Path, layout: str, out: Path) -> Path:
    """A checkpoint converted into its own layout, with all that it holds kept as it is."""
    document = {
        "kind": "recipe",
        "version": 1,
        "name": "kept",
        "source": {"layout": layout},
        "schemes": {},
        "rules": [],
        "target": {"layout": layout, "file": FILE, "passthrough_dtype": "keep"},
    }
    return convert(parsed(document), folder, out).out


def small(folder: Path, *modules: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Modules of the golden checkpoints' source, with what stays plain, as a source of ours."""
    chosen = {
        key: tensor.to(dtype)
        for key, tensor in source().items()
        if key.rpartition(".")[0].rpartition(".")[2] in (*modules, "norm", "head")
    }
    folder.mkdir(parents=True)
    save_file(chosen, folder / FILE)
    return folder


def written(
    folder: Path,
    layout: str,
    weight: Json,
    *modules: str,
    dtype: torch.dtype = torch.bfloat16,
    activation: Json | None = None,
) -> Path:
    """These modules of the golden checkpoints' source, converted, by both converters alike."""
    source = small(folder / "in", *modules, dtype=dtype)
    scheme: Json = {"weight": weight}
    if activation is not None:
        scheme["activation"] = activation
    document = recipe(
        target=layout,
        target_fields={"file": FILE},
        schemes={"all": scheme},
        rules=[{"modules": [f"layers.0.**.{module}" for module in modules], "scheme": "all"}],
    )
    out = convert(parsed(document), source, folder / "out", block_bytes=1500).out
    again = convert(parsed(document), source, folder / "again", converter="reference").out
    assert result_of(out) == result_of(again)
    assert not verify(out, against=source).problems
    return out


def metadata(folder: Path) -> dict[str, str]:
    """The metadata of the one file of a folder."""
    with safe_open(folder / FILE, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def llama(folder: Path, transformers: Any, **options: Any) -> Any:
    """A small language model in bfloat16, saved plain."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=48,
        pad_token_id=0,
        **options,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def assert_loaded(
    model: Any, plain: Any, out: Path, dense: Callable[[Any], Tensor], tolerance: float
) -> None:
    """A language model that a peer loaded from ours holds our weights and computes with them.

    Args:
        model: as the peer loaded it.
        plain: the model that was converted.
        out: what was written.
        dense: a quantized layer's weight, dequantized by the peer.
        tolerance: how far its logits may be off, of the largest.
    """
    state = load_state_dict(out, dtype=torch.bfloat16)
    with open_checkpoint(out) as checkpoint:
        modules = checkpoint.part().modules
    quantized = [name for name, module in modules.items() if "weight_scale" in module.tensors]
    assert len(quantized) == 7
    for name in quantized:
        layer = model.get_submodule(name)
        assert type(layer.weight) is not nn.Parameter or layer.weight.dtype == torch.int8
        assert torch.equal(dense(layer).to(torch.bfloat16), state[f"{name}.weight"]), name
    assert type(model.lm_head) is nn.Linear
    difference = plain.load_state_dict(state, strict=False)
    assert not difference.unexpected_keys
    wanted, found = plain(IDS).logits, model(IDS).logits
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def spoilt(folder: Path, **settings: Any) -> Path:
    """A folder whose ``quantization_config`` says these things too."""
    path = folder / "config.json"
    document = json.loads(path.read_text("utf-8"))
    document["quantization_config"] |= settings
    path.write_text(json.dumps(document), "utf-8")
    return folder
