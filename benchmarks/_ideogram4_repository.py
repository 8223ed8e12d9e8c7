"""A repository in the shape of Ideogram 4, of any size, with random numbers in all of its weights.

Both branches are in FP8 with a scale for each row, under the names that diffusers has; the text
encoder and the VAE are in bfloat16. Numbers are made on the device and written piece by piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from quantrecipe.publishing.facts import Needed
from quantrecipe.publishing.scripts import (
    DOWNLOAD_NAME,
    USAGE_NAME,
    Component,
    download_script,
    pipeline_script,
)
from quantrecipe.schema.placement import encode_header, file_order
from quantrecipe.schema.tensors import OutputTensor

PARTS = {"conditional": "transformer", "unconditional": "unconditional_transformer"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASS = "Ideogram4Transformer2DModel"
FP8 = torch.float8_e4m3fn
LARGEST_CODE, TYPICAL_CODE = 448.0, 100.0
TYPICAL_WEIGHT = 0.02
_TAPS = 13
"""Layers of the text encoder whose states make up a token's features."""

TEMPLATE = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"


@dataclass(frozen=True)
class Sizes:
    """What decides every shape; by default, those of Ideogram 4.

    Attributes:
        layers, heads, head_dim, ffn, adaln, rope: of a branch.
        text: of the text encoder: hidden and intermediate size, heads, heads of keys and values,
            their width, words, and the parts of rotary embeddings.
        vae: arguments of the VAE; its latents have ``channels / 4`` channels.
        channels: of packed latents.
    """

    layers: int = 34
    heads: int = 18
    head_dim: int = 256
    ffn: int = 12288
    adaln: int = 512
    channels: int = 128
    rope: tuple[int, int, int] = (24, 20, 20)
    text: tuple[int, int, int, int, int, int, tuple[int, int, int]] = (
        4096,
        12288,
        32,
        8,
        128,
        151_936,
        (24, 20, 20),
    )
    text_layers: int = 36
    vae: tuple[tuple[str, Any], ...] = ()

    @property
    def branch(self) -> dict[str, Any]:
        """Arguments of a branch."""
        return {
            "in_channels": self.channels,
            "num_layers": self.layers,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "intermediate_size": self.ffn,
            "adaln_dim": self.adaln,
            "llm_features_dim": _TAPS * self.text[0],
            "mrope_section": self.rope,
        }


SMALL_TEXT = (1024, 3072, 8, 2, 128, 151_936, (24, 20, 20))
TOY = Sizes(
    layers=4,
    heads=2,
    head_dim=16,
    ffn=64,
    adaln=16,
    channels=16,
    rope=(4, 2, 2),
    text=(32, 32, 2, 1, 16, 128, (4, 2, 2)),
    vae=(
        ("block_out_channels", (8, 8, 8)),
        ("down_block_types", ("DownEncoderBlock2D",) * 3),
        ("up_block_types", ("UpDecoderBlock2D",) * 3),
        ("layers_per_block", 1),
        ("latent_channels", 4),
        ("norm_num_groups", 2),
    ),
)


def write_repository(folder: Path, sizes: Sizes, device: torch.device) -> None:
    """Write all of it, as ``save_pretrained`` of the pipeline would."""
    torch.manual_seed(0)
    index: dict[str, Any] = {"_class_name": "Ideogram4Pipeline"}
    index |= {"scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler")}
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index |= {"tokenizer": ("transformers", "PreTrainedTokenizerFast")}
    _tokenizer().save_pretrained(folder / "tokenizer")
    with torch.device("meta"):
        encoder = transformers.Qwen3VLModel(_text_config(sizes))
        vae = diffusers.AutoencoderKLFlux2(**dict(sizes.vae))
        branch = diffusers.Ideogram4Transformer2DModel(**sizes.branch)
    for name, model in (("text_encoder", encoder), ("vae", vae)):
        index[name] = type(model).__module__.partition(".")[0], type(model).__name__
        model.to(torch.bfloat16).to_empty(device=device)
        for key, tensor in model.state_dict().items():
            tensor.copy_(_random(key, tensor))
        model.save_pretrained(folder / name, max_shard_size="4GB")
        model.to("meta")
    for name in PARTS.values():
        index[name] = "diffusers", CLASS
        branch.save_config(folder / name)
        _write_branch(folder / name / WEIGHTS, branch, device)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def publish(out: Path, base: Path) -> None:
    """Put the programs beside what was converted; the rest is in ``base``."""
    converted = {f"{name}/{WEIGHTS}" for name in PARTS.values()}
    sizes = {
        path.relative_to(base).as_posix(): path.stat().st_size
        for path in base.rglob("*")
        if path.is_file()
    }
    needed = {path: size for path, size in sizes.items() if path not in converted}
    components = {
        name: Component(part, CLASS, f"{name}/config.json") for part, name in PARTS.items()
    }
    (out / USAGE_NAME).write_bytes(pipeline_script("Ideogram4Pipeline", components))
    script = download_script(Needed("random/ideogram-4", "0" * 40, False, needed))
    (out / DOWNLOAD_NAME).write_bytes(script)


def _random(name: str, like: Tensor) -> Tensor:
    """Numbers of the size of trained ones."""
    if not like.is_floating_point():
        return torch.zeros_like(like)
    if name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
        return torch.ones_like(like)
    return torch.randn_like(like) * TYPICAL_WEIGHT


def _write_branch(path: Path, branch: nn.Module, device: torch.device) -> None:
    """A branch in FP8: a weight fills the range of codes, a scale brings it to its size."""
    tensors = tuple(file_order(_branch_tensors(branch)))
    with path.open("wb") as file:
        file.write(encode_header(tensors, {"format": "pt"}))
        for tensor in tensors:
            dtype = getattr(torch, tensor.dtype)
            if dtype == FP8:
                values = torch.randn(tensor.shape, device=device) * TYPICAL_CODE
                values.clamp_(-LARGEST_CODE, LARGEST_CODE)
            elif dtype == torch.float32:
                scales = torch.rand(tensor.shape, device=device) + 0.5
                values = scales * (TYPICAL_WEIGHT / TYPICAL_CODE)
            else:
                values = _random(tensor.name, torch.empty(tensor.shape, device=device))
            file.write(values.to(dtype).cpu().contiguous().view(torch.uint8).numpy().data)


def _branch_tensors(branch: nn.Module) -> Iterator[OutputTensor]:
    linears = {name for name, module in branch.named_modules() if isinstance(module, nn.Linear)}
    for name, tensor in branch.state_dict().items():
        module, _, role = name.rpartition(".")
        shape = tuple(tensor.shape)
        if module in linears and role == "weight":
            yield OutputTensor(name, "float8_e4m3fn", shape)
            yield OutputTensor(f"{name}_scale", "float32", shape[:1])
        else:
            yield OutputTensor(name, "bfloat16", shape)


def _text_config(sizes: Sizes) -> Any:
    hidden, intermediate, heads, kv_heads, head_dim, words, sections = sizes.text
    rope = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": list(sections)}
    text = {
        "vocab_size": words,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rope_parameters": rope,
    }
    vision = {  # not used by the pipeline
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": hidden,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [0],
    }
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision)


def _tokenizer() -> Any:
    """A token for each character: what a prompt says makes no difference to random weights."""
    words = {chr(code): code for code in range(32, 127)}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    kind: Any = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=made, unk_token="?", chat_template=TEMPLATE)
