"""Ideogram 4's tensors under the names of the original checkpoint, written down as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantrecipe.schema.tensors import OutputTensor

BRANCH_PARAMETERS = 9_279_288_448
FP8_FILE_BYTES = 9_289_792_888
LAYERS, HIDDEN, HEAD, FFN, ADALN, TEXT = 34, 4608, 256, 12288, 512, 53248


@dataclass(frozen=True)
class Linear:
    """A linear; ``split`` are the diffusers names of equal row slices, in order."""

    name: str
    out_features: int
    in_features: int
    bias: bool
    split: tuple[str, ...]


def linears() -> Iterator[Linear]:
    """The 211 linears of one branch."""
    yield from (
        Linear(name, out_features, in_features, True, (name,))
        for name, out_features, in_features in (
            ("input_proj", HIDDEN, 128),
            ("llm_cond_proj", HIDDEN, TEXT),
            ("t_embedding.mlp_in", HIDDEN, HIDDEN),
            ("t_embedding.mlp_out", HIDDEN, HIDDEN),
            ("adaln_proj", ADALN, HIDDEN),
            ("final_layer.linear", 128, HIDDEN),
            ("final_layer.adaln_modulation", HIDDEN, ADALN),
        )
    )
    for index in range(LAYERS):
        yield from layer_linears(f"layers.{index}")


def layer_linears(layer: str) -> Iterator[Linear]:
    attention = f"{layer}.attention"
    qkv = tuple(f"{attention}.to_{which}" for which in "qkv")
    yield Linear(f"{attention}.qkv", 3 * HIDDEN, HIDDEN, False, qkv)
    yield Linear(f"{attention}.o", HIDDEN, HIDDEN, False, (f"{attention}.to_out.0",))
    for name, out_features, in_features in (
        (f"{layer}.feed_forward.w1", FFN, HIDDEN),
        (f"{layer}.feed_forward.w3", FFN, HIDDEN),
        (f"{layer}.feed_forward.w2", HIDDEN, FFN),
    ):
        yield Linear(name, out_features, in_features, False, (name,))
    modulation = f"{layer}.adaln_modulation"
    yield Linear(modulation, 4 * HIDDEN, ADALN, True, (modulation,))


def other_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor that belongs to no linear, by name."""
    shapes: dict[str, tuple[int, ...]] = {
        "llm_cond_norm.weight": (TEXT,),
        "embed_image_indicator.weight": (2, HIDDEN),
    }
    for index in range(LAYERS):
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            shapes[f"layers.{index}.{norm}.weight"] = (HIDDEN,)
        for norm in ("norm_q", "norm_k"):
            shapes[f"layers.{index}.attention.{norm}.weight"] = (HEAD,)
    return shapes


def tensors(fp8: bool) -> Iterator[OutputTensor]:
    """One branch: as the FP8 base has it (669 tensors), or all in bfloat16."""
    for linear in linears():
        shape = (linear.out_features, linear.in_features)
        yield OutputTensor(f"{linear.name}.weight", "float8_e4m3fn" if fp8 else "bfloat16", shape)
        if fp8:
            yield OutputTensor(f"{linear.name}.weight_scale", "float32", shape[:1])
        if linear.bias:
            yield OutputTensor(f"{linear.name}.bias", "bfloat16", shape[:1])
    for name, other in other_shapes().items():
        yield OutputTensor(name, "bfloat16", other)
