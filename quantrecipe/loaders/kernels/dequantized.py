"""The kernel for whatever has no better one: weights become plain numbers, call by call."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from quantrecipe.loaders.kernels.arithmetic import (
    dequantize_weight,
    expand_scales,
    quantize_activations,
    smoothed,
)
from quantrecipe.loaders.kernels.call import LinearCall
from quantrecipe.loaders.kernels.on_cpu import blocks, multiplies, scratch, weights_at_a_time

_TOGETHER: Final = 32
"""Columns that processors multiply at once in 16 bits."""


class DequantizedKernel:
    """Dequantizes the weight into the activations' dtype and multiplies there.

    Activation formats are honoured by rounding activations to their codes and back. With W8A8 in
    a 16-bit dtype that rounds twice: the other kernels are closer to the definition, and faster.
    On a CPU that has no instructions for a 16-bit dtype both happen in float32, and never more
    than a block of the weight is dequantized at a time.
    """

    name = "dequantized"

    def refuses(self, call: LinearCall) -> str | None:
        return None

    def linear(
        self,
        call: LinearCall,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        smoothing: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        changed = smoothing is not None or call.rotation
        values = smoothed(x, smoothing, call.rotation) if changed else x
        if call.activation:
            codes, scale = quantize_activations(values.float(), call.activation)
            values = codes.float() * scale
        if call.device.type == "cpu":
            return _by_blocks(call, values, weight, weight_scale, bias)
        plain = dequantize_weight(weight, weight_scale, call.group, call.dtype)
        return functional.linear(
            values.to(call.dtype), plain, None if bias is None else bias.to(call.dtype)
        )


def _by_blocks(
    call: LinearCall, values: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    dtype = call.dtype if multiplies(call.dtype) else torch.float32
    values = _filled(values.to(dtype))
    result = values.new_empty((call.rows, call.out_features), dtype=call.dtype)
    step = _rows_at_a_time(call)
    converted = scratch(step, call.in_features)
    for columns in blocks(call.out_features, step):
        plain = converted[: columns.stop - columns.start].copy_(weight[columns])
        plain.mul_(_scales(call, weight_scale, columns))
        product = values @ _filled(plain.to(dtype)).T
        result[:, columns] = product if bias is None else product.add_(bias[columns])
    return result


def _filled(rows: Tensor) -> Tensor:
    """Rows of a 16-bit dtype, with zeros up to a multiple of 32 columns; others as they are.

    Behind the end of a row torch's product multiplies the beginning of the next by 0: a NaN there
    would come into this one.
    """
    missing = -rows.shape[1] % _TOGETHER
    if rows.dtype == torch.float32 or not missing:
        return rows
    return functional.pad(rows, (0, missing))


def _rows_at_a_time(call: LinearCall) -> int:
    """Rows of the weight in a block: whole groups, unless one group is all of them."""
    step = weights_at_a_time(call.out_features, call.in_features)
    if 1 < call.grid[0] < call.out_features:
        step = -(-step // call.group[0]) * call.group[0]
    return min(step, call.out_features)


def _scales(call: LinearCall, weight_scale: Tensor, rows: slice) -> Tensor:
    """The scales of some rows of the weight, to broadcast against them."""
    if call.grid[0] > 1:
        weight_scale = weight_scale[rows.start // call.group[0] : -(-rows.stop // call.group[0])]
    shape = torch.Size((rows.stop - rows.start, call.in_features))
    return expand_scales(weight_scale.float(), call.group, shape)
