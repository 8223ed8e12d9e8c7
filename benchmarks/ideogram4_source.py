"""Write a checkpoint in the shape of Ideogram 4, in FP8 or bfloat16, of any scale, from a seed.

    python benchmarks/ideogram4_source.py OUT --scale 1.0 --seed 0

At full scale each branch has the names, dtypes, shapes and the size (9,289,792,888 bytes) of the
published ``ideogram-4-fp8``; the numbers are random. ``--scale`` narrows it, ``--layers`` and
``--branches`` shorten it. ``--dtype bfloat16`` writes ordinary weights under the same names, with
no scales. Memory stays small: weights are cut from one pool of random numbers.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from quantrecipe.schema.placement import encode_header, file_order
from quantrecipe.schema.tensors import OutputTensor

BRANCHES = ("transformer", "unconditional_transformer")
FILE_NAME = "diffusion_pytorch_model.safetensors"
FP8 = "float8_e4m3fn"
DTYPES = (FP8, "bfloat16")
LARGEST_CODE = 448.0
TYPICAL_WEIGHT = 0.02
_POOL_BYTES = (1 << 26) - 5  # odd, so that rows of one tensor do not line up with another's


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes that decide every shape of a branch."""

    layers: int = 34
    heads: int = 18
    head_dim: int = 256
    ffn: int = 12288
    adaln: int = 512
    channels: int = 128
    text_features: int = 13 * 4096

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim

    @classmethod
    def scaled(cls, scale: float, layers: int | None = None) -> Dimensions:
        """The dimensions with every width multiplied by about ``scale``."""
        return cls(
            layers=34 if layers is None else layers,
            heads=max(1, round(18 * scale)),
            ffn=256 * max(1, round(48 * scale)),
            adaln=32 * max(1, round(16 * scale)),
            text_features=13 * 64 * max(1, round(64 * scale)),
        )


def linears(dim: Dimensions) -> Iterator[tuple[str, int, int, bool]]:
    """Name, out features, in features and whether there is a bias, for every linear of a branch."""
    hidden = dim.hidden
    yield "input_proj", hidden, dim.channels, True
    yield "llm_cond_proj", hidden, dim.text_features, True
    yield "t_embedding.mlp_in", hidden, hidden, True
    yield "t_embedding.mlp_out", hidden, hidden, True
    yield "adaln_proj", dim.adaln, hidden, True
    for index in range(dim.layers):
        layer = f"layers.{index}"
        yield f"{layer}.attention.qkv", 3 * hidden, hidden, False
        yield f"{layer}.attention.o", hidden, hidden, False
        yield f"{layer}.feed_forward.w1", dim.ffn, hidden, False
        yield f"{layer}.feed_forward.w2", hidden, dim.ffn, False
        yield f"{layer}.feed_forward.w3", dim.ffn, hidden, False
        yield f"{layer}.adaln_modulation", 4 * hidden, dim.adaln, True
    yield "final_layer.linear", dim.channels, hidden, True
    yield "final_layer.adaln_modulation", hidden, dim.adaln, True


def branch_tensors(dim: Dimensions, dtype: str = FP8) -> tuple[OutputTensor, ...]:
    """Every tensor of a branch, in file order: widest dtype first, then by name.

    Args:
        dim: the shapes.
        dtype: of the weights of linears; those in FP8 have a scale for each row beside them.
    """
    tensors = [
        OutputTensor("llm_cond_norm.weight", "bfloat16", (dim.text_features,)),
        OutputTensor("embed_image_indicator.weight", "bfloat16", (2, dim.hidden)),
    ]
    for module, out_features, in_features, has_bias in linears(dim):
        tensors.append(OutputTensor(f"{module}.weight", dtype, (out_features, in_features)))
        if dtype == FP8:
            tensors.append(OutputTensor(f"{module}.weight_scale", "float32", (out_features,)))
        if has_bias:
            tensors.append(OutputTensor(f"{module}.bias", "bfloat16", (out_features,)))
    for index in range(dim.layers):
        layer = f"layers.{index}"
        tensors += [
            OutputTensor(f"{layer}.{norm}.weight", "bfloat16", (dim.hidden,))
            for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
        ]
        tensors += [
            OutputTensor(f"{layer}.attention.{norm}.weight", "bfloat16", (dim.head_dim,))
            for norm in ("norm_q", "norm_k")
        ]
    return tuple(file_order(tensors))


def branch_bytes(dim: Dimensions, dtype: str = FP8) -> int:
    """The size of a branch's file, from its header alone."""
    tensors = branch_tensors(dim, dtype)
    return len(encode_header(tensors, {"format": "pt"})) + sum(t.nbytes for t in tensors)


def _generator(seed: int, name: str) -> torch.Generator:
    # torch looks at 32 bits of a seed only, so seed and name have to be mixed into as many.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _pool(seed: int, dtype: str, size: int) -> memoryview:
    """The bytes of random weights, normally distributed, none of them NaN.

    Codes of FP8 fill its range; weights in bfloat16 are as large as those codes times their scales.
    """
    count = size // (1 if dtype == FP8 else 2)
    values = torch.randn(count, generator=_generator(seed, "pool"))
    if dtype == FP8:
        values.mul_(LARGEST_CODE / 4.5).clamp_(-LARGEST_CODE, LARGEST_CODE)
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy().data
    return values.mul_(TYPICAL_WEIGHT).to(torch.bfloat16).view(torch.uint8).numpy().data


def _small_tensor(tensor: OutputTensor, generator: torch.Generator) -> bytes:
    """A scale, a norm, a bias or an embedding: whatever is not a weight in codes."""
    normal = torch.randn(tensor.shape, generator=generator)
    if tensor.dtype == "float32":  # a scale: weights of about 0.02, rows that differ in size
        values = (normal * 0.3).exp_().mul_(TYPICAL_WEIGHT * 4.5 / LARGEST_CODE)
    elif "norm" in tensor.name:
        values = (1.0 + 0.1 * normal).to(torch.bfloat16)
    else:
        values = (TYPICAL_WEIGHT * normal).to(torch.bfloat16)
    return values.view(torch.uint8).numpy().tobytes()


def _write_from_pool(file: BinaryIO, pool: memoryview, start: int, count: int) -> None:
    while count:
        piece = pool[start : start + count]
        file.write(piece)
        count -= len(piece)
        start = 0


def write_branch(
    path: Path,
    dim: Dimensions,
    seed: int,
    dtype: str = FP8,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write one branch and return its size in bytes.

    Args:
        path: the safetensors file; its folder is made.
        dim: the shapes.
        seed: of every number in it; two branches need two seeds.
        dtype: of the weights of linears.
        progress: called with the bytes of each tensor after it was written.
    """
    tensors = branch_tensors(dim, dtype)
    weights = {f"{module}.weight" for module, *_ in linears(dim)}
    item = 1 if dtype == FP8 else 2
    pool = _pool(seed, dtype, min(_POOL_BYTES, max(tensor.nbytes for tensor in tensors)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(encode_header(tensors, {"format": "pt"}))
        for tensor in tensors:
            generator = _generator(seed, tensor.name)
            if tensor.name in weights:
                start = int(torch.randint(len(pool) // item, (), generator=generator)) * item
                _write_from_pool(file, pool, start, tensor.nbytes)
            else:
                file.write(_small_tensor(tensor, generator))
            progress(tensor.nbytes)
        return file.tell()


def write_config(path: Path, dim: Dimensions) -> None:
    """Write the ``config.json`` that says the same dimensions."""
    config = {
        "_class_name": "Ideogram4Transformer2DModel",
        "adaln_dim": dim.adaln,
        "attention_head_dim": dim.head_dim,
        "in_channels": dim.channels,
        "intermediate_size": dim.ffn,
        "llm_features_dim": dim.text_features,
        "num_attention_heads": dim.heads,
        "num_layers": dim.layers,
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--scale", type=float, default=1.0, help="width, 1.0 is the real one")
    parser.add_argument("--layers", type=int, default=None, help="layers a branch (default: 34)")
    parser.add_argument("--branches", type=int, choices=(1, 2), default=2)
    parser.add_argument("--dtype", choices=DTYPES, default=FP8, help="of the linears' weights")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    dim = Dimensions.scaled(options.scale, options.layers)
    for number, branch in enumerate(BRANCHES[: options.branches]):
        path = options.out / branch / FILE_NAME
        size = write_branch(path, dim, 2 * options.seed + number, options.dtype)
        write_config(path.with_name("config.json"), dim)
        print(f"{path}  {size:,} bytes")


if __name__ == "__main__":
    main()
