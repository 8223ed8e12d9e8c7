"""Inputs as a loader's kernels meet them: smoothed, rotated, and rounded to codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from quantrecipe.formats import dequantize, quantize
from quantrecipe.formats.rotation import rotate_
from quantrecipe.schema.schemes import (
    AnyScaledWeight,
    DynamicActivation,
    Float8Channel,
    Float8Tensor,
    Int8Channel,
    Int8Tensor,
)

_AS_WEIGHTS: Final[Mapping[tuple[str, str], AnyScaledWeight]] = {
    ("int8", "token"): Int8Channel(format="int8", granularity="channel"),
    ("int8", "tensor"): Int8Tensor(format="int8", granularity="tensor"),
    ("float8_e4m3fn", "token"): Float8Channel(format="float8_e4m3fn", granularity="channel"),
    ("float8_e4m3fn", "tensor"): Float8Tensor(format="float8_e4m3fn", granularity="tensor"),
}
"""Activations are quantized as weights are, tokens in the place of output channels."""


def prepared(tokens: Tensor, factors: Tensor | None, rotation: int | None) -> Tensor:
    """Tokens as they are quantized, float32 ``[tokens, in]``; those that are given do not change.

    Args:
        tokens: float32 ``[tokens, in]``.
        factors: what they are divided by first, float32 ``[in]``.
        rotation: the columns in a block of the rotation that follows.
    """
    if factors is not None:
        tokens = tokens / factors
    if rotation is None:
        return tokens
    return rotate_(tokens if factors is not None else tokens.clone(), rotation)


def as_quantized(tokens: Tensor, activation: DynamicActivation | None) -> Tensor:
    """What quantized activations stand for, float32 ``[tokens, in]``.

    Args:
        tokens: float32 ``[tokens, in]``.
        activation: as the scheme says; one scale for the whole input means for all of ``tokens``
            here. ``None``: they stay as they are.
    """
    if activation is None:
        return tokens
    spec = _AS_WEIGHTS[activation.format, activation.granularity]
    found = quantize(tokens, spec)
    return dequantize(found.codes, found.scale, spec)
