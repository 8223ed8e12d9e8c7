"""The kernel of exact int8 products without a compiler: by a library, or in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from quantrecipe.loaders.kernels.arithmetic import (
    activation_codes,
    activation_scale,
    largest_magnitude,
    smoothed,
)
from quantrecipe.loaders.kernels.call import LinearCall
from quantrecipe.loaders.kernels.on_cpu import blocks, multiplies, scratch, weights_at_a_time

_LONGEST: Final = 131_071
"""Products of two int8 codes, any of 256, whose sum surely fits into int32."""
_RUN: Final = 1024
"""Products whose sum float32 holds exactly: 2^7 * 127 * 1024 is below 2^24."""
_ROWS: Final = 512
"""Rows of activations worked on at a time, so that what lies between the steps stays in cache."""
_CUDA_ROWS: Final = 32
"""Rows come in multiples of this on CUDA, features in multiples of 16: the library has no int8
product for every odd size, and ``torch._int_mm`` none for fewer than 17 rows."""
_CUDA_PRODUCTS: Final = 1 << 23
"""Products (int32) between a multiplication and its scaling: what a GPU's cache holds."""


class IntMmKernel:
    """W8A8 with scales by row: sums of products are exact, so rows do not depend on each other.

    On CUDA, and on CPUs that multiply int8, by ``torch._int_mm``. On other CPUs in float32, in
    runs along the columns that are short enough to be exact: that is nearly as fast as a float32
    linear, and with many rows much faster than a bfloat16 one.
    """

    name = "int_mm"

    def refuses(self, call: LinearCall) -> str | None:
        if not call.is_w8a8:
            return "it computes products of int8 codes whose weight has a scale for each row"
        if call.device.type == "cuda":
            if call.in_features % 16 or call.out_features % 16:
                return "on cuda it takes features in multiples of 16"
            if call.in_features > _LONGEST:
                return f"on cuda it sums no more than {_LONGEST} products"
        elif call.device.type != "cpu":
            return f"it does not run on {call.device.type}"
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
        result = x.new_empty((call.rows, call.out_features))
        column_scale = weight_scale.float().T.expand(1, call.out_features)
        column_bias = None if bias is None else bias.float()
        for rows, values, scale in _quantized(call, x, smoothing):
            for columns, products in _products(call, values, weight):
                # A row's scale may be large: last, it cannot overflow before the result does.
                scaled = products * column_scale[:, columns]
                scaled = scaled.mul_(scale)
                if column_bias is not None:
                    scaled = scaled.add_(column_bias[columns])
                result[rows, columns] = scaled
        return result


def _rows_at_a_time(call: LinearCall) -> int:
    if call.device.type == "cpu":
        return _ROWS
    return max(_ROWS, _CUDA_PRODUCTS // call.out_features // _ROWS * _ROWS)


def _quantized(
    call: LinearCall, x: Tensor, smoothing: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their codes as float32 ``[rows, in]``, and scales, ``[rows, 1]`` or ``[1, 1]``."""
    parts = list(blocks(call.rows, _rows_at_a_time(call)))
    of_all = None
    if call.activation.endswith(":tensor"):
        each = [
            largest_magnitude(smoothed(x[rows], smoothing, call.rotation), call.activation)
            for rows in parts
        ]
        of_all = torch.stack(each).amax(dim=0)
    for rows in parts:
        values = smoothed(x[rows], smoothing, call.rotation)
        largest = largest_magnitude(values, call.activation) if of_all is None else of_all
        scale = activation_scale(largest, call.activation)
        yield rows, activation_codes(values, scale, call.activation), scale


def _products(call: LinearCall, values: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Columns of the result, and what codes and weight make there before scaling, exactly."""
    if call.device.type == "cuda":
        yield slice(0, call.out_features), _by_library(values, weight, _CUDA_ROWS)
    elif 1 < call.in_features <= _LONGEST and multiplies(torch.int8):
        yield slice(0, call.out_features), _by_library(values, weight, 1)
    else:
        yield from _in_float32(values, weight)


def _by_library(values: Tensor, weight: Tensor, multiple: int) -> Tensor:
    """int32 ``[rows, out]``; rows of zeros make up what is missing to a multiple."""
    rows = values.shape[0]
    codes = functional.pad(values.to(torch.int8), (0, 0, 0, -rows % multiple))
    return torch._int_mm(_row_major(codes), _row_major(weight).T)[:rows]


def _row_major(matrix: Tensor) -> Tensor:
    """The same numbers, with the strides that a matrix of this shape has by rows.

    The stride of a dimension of size one may be anything, and the library on CPUs believes it: it
    reads past the end of a single row whose stride is 1. With one feature no strides help it.
    """
    return matrix.contiguous().as_strided(matrix.shape, (matrix.shape[1], 1))


def _in_float32(values: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of columns, and their sums rounded to float32, ``[rows, columns]``.

    The weight is converted block by block into one buffer, which stays in cache.
    """
    rows, (out_features, in_features) = values.shape[0], weight.shape
    step = weights_at_a_time(out_features, in_features)
    several = in_features > _RUN
    converted = scratch(step, in_features)
    part = values.new_empty(rows * step)
    total = values.new_empty(rows * step if several else 0, dtype=torch.float64)
    for columns in blocks(out_features, step):
        width = columns.stop - columns.start
        plain = converted[:width].copy_(weight[columns])
        products = part[: rows * width].view(rows, width)
        sums = total[: rows * width].view(rows, width) if several else products
        for run in blocks(in_features, _RUN):
            torch.mm(values[:, run], plain[:, run].T, out=products)
            if several:
                sums.add_(products) if run.start else sums.copy_(products)
        yield columns, sums.float()
