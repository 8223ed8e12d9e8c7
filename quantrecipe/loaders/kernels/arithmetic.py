"""The steps of a quantized linear in plain torch, on any device and without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from quantrecipe.formats.rotation import hadamard, rotate_

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_TF32 = ~0x1FFF
"""The bits of a float32 that TF32 has."""
_CODES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}


def smoothed(x: Tensor, smoothing: Tensor | None, rotation: int = 0) -> Tensor:
    """``x / smoothing``, rotated in blocks of ``rotation`` columns, in float32 ``[rows, in]``."""
    values = x.float()
    return turned(values if smoothing is None else values / smoothing, rotation)


def turned(values: Tensor, rotation: int) -> Tensor:
    """Float numbers ``[..., in]`` rotated in blocks of ``rotation`` columns, 0: as they are.

    On CUDA by a multiplication with the matrix, in the order and precision of the library; a pass
    over the numbers for each operation of ``rotate_`` would take far longer. Its sums of ``n``
    numbers are within ``(n - 1) u |x|_1 / sqrt(n)``; where TF32 is allowed, numbers are handed to
    it in two parts that it holds, and ``u`` is 2^-21 for what they leave out.
    """
    if not rotation:
        return values
    if not values.is_cuda:
        return rotate_(values.clone(memory_format=torch.contiguous_format), rotation)
    blocks = values.reshape(-1, rotation)
    matrix = hadamard(rotation, values.device, values.dtype)
    if values.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        upper = (blocks.view(torch.int32) & _TF32).view(torch.float32)
        product = torch.addmm(upper @ matrix, blocks - upper, matrix)
    else:
        product = blocks @ matrix
    return product.view(values.shape)


def quantize_activations(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of activations, from the values of this call.

    The scale of a row of zeros is 1. No scale is below the smallest normal number. A row that holds
    a NaN or an infinity has a scale that is no finite number, so its results are none either.

    Args:
        x: float32 ``[rows, in]``.
        activation: ``FORMAT:GRANULARITY``.

    Returns:
        codes ``[rows, in]`` and float32 scales ``[rows, 1]``, or ``[1, 1]`` by tensor.
    """
    scale = activation_scale(largest_magnitude(x, activation), activation)
    return activation_codes(x, scale, activation).to(_code_dtype(activation)), scale


def largest_magnitude(x: Tensor, activation: str) -> Tensor:
    """What a scale of ``activation`` is made from, ``[rows, 1]``, or ``[1, 1]`` by tensor."""
    largest = x.abs().amax(dim=1, keepdim=True)
    return largest.amax(dim=0, keepdim=True) if activation.endswith(":tensor") else largest


def activation_scale(largest: Tensor, activation: str) -> Tensor:
    """Scales for groups of these largest magnitudes, float32 in the same shape."""
    scale = torch.div(largest, largest.new_full((), _LARGEST[_code_dtype(activation)]))
    scale = scale.clamp_(min=torch.finfo(torch.float32).smallest_normal)
    return torch.where(largest == 0, torch.ones_like(scale), scale)


def activation_codes(x: Tensor, scale: Tensor, activation: str) -> Tensor:
    """Codes as float32 ``[rows, in]``: whole numbers for int8; for float8 not yet rounded."""
    dtype = _code_dtype(activation)
    ratio = torch.div(x, scale)
    if dtype == torch.int8:
        ratio = ratio.round_()
    # A ratio that is no number has a scale that is none; the cast only needs it to be one.
    return ratio.nan_to_num_(0.0).clamp_(-_LARGEST[dtype], _LARGEST[dtype])


def _code_dtype(activation: str) -> torch.dtype:
    return _CODES[activation.partition(":")[0]]


def expand_scales(scale: Tensor, group: tuple[int, int], shape: torch.Size) -> Tensor:
    """A grid of scales as something that broadcasts against the weight ``shape``.

    Args:
        scale: ``[row groups, column groups]``.
        group: rows and columns that share a scale; those at the edges may be smaller.
        shape: ``[out, in]``.
    """
    (rows, columns), (out_features, in_features) = group, shape
    if scale.shape[0] not in (1, out_features):
        scale = scale.repeat_interleave(rows, dim=0)[:out_features]
    if scale.shape[1] not in (1, in_features):
        scale = scale.repeat_interleave(columns, dim=1)[:, :in_features]
    return scale


def dequantize_weight(
    weight: Tensor, scale: Tensor, group: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """``float32(codes) * float32(scale)``, rounded to ``dtype``, ``[out, in]``."""
    factors = expand_scales(scale.float(), group, weight.shape)
    return (weight.float() * factors).to(dtype)
