"""The operators behind every quantized linear, ``torch.ops.quantrecipe.linear`` above all.

A weight whose codes are packed, or lie in records, goes through ``levels`` first: what its codes
stand for, in a dtype that kernels multiply by scales as they do codes. Scales that are not stored
as they multiply go through ``scales``. Compilers, exporters and CUDA graphs see opaque
operators whose results' shapes they know; kernels are chosen inside, call by call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from quantrecipe.formats import get_format
from quantrecipe.formats.arrangement import unswizzle
from quantrecipe.formats.double_quantization import decompress
from quantrecipe.formats.fp4 import as_e4m3
from quantrecipe.formats.ggml import RECORD_FORMATS
from quantrecipe.formats.llm_int8 import STEP
from quantrecipe.formats.nvfp4 import multiplied
from quantrecipe.formats.packing import unpack, unpack_down
from quantrecipe.formats.records import RecordFormat
from quantrecipe.loaders.kernels.arithmetic import dequantize_weight, turned
from quantrecipe.loaders.kernels.call import LinearCall
from quantrecipe.loaders.kernels.choosing import choose
from quantrecipe.schema.storage import PACKINGS, TILE_COLUMNS, TILE_ROWS, Packing, padded

_PACKINGS: Final[Mapping[str, Packing]] = {str(name): each for name, each in PACKINGS.items()}
_LIBRARY: Final = torch.library.Library("quantrecipe", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? smoothing, Tensor? bias, "
    "int rotation, int[2] group, str activation, str kernel) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "dequantize(Tensor weight, Tensor weight_scale, int[2] group, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


_LIBRARY.define(
    "levels(Tensor weight, Tensor? zero_point, int columns, int[2] group, str format, "
    "str packing, str zero_point_packing) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_LIBRARY.define(
    "scales(Tensor weight_scale, Tensor? second_scale, Tensor? offset, float? offset_number, "
    "int[2] grid, str format, str arrangement, bool reciprocal) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

LEVEL_DTYPES: Final = MappingProxyType(
    {
        "int4": torch.int8,
        "nf4": torch.float32,
        "mxfp4": torch.float8_e4m3fn,
        "nvfp4": torch.float8_e4m3fn,
        **dict.fromkeys(RECORD_FORMATS, torch.float32),
    }
)
"""What the codes of packed formats and of records become: int4 less the zero points, nf4's own
numbers, those of e2m1 as e4m3, which has them all, and records the numbers that they stand for."""

_E2M1: Final = frozenset({"mxfp4", "nvfp4"})


def _linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    smoothing: Tensor | None,
    bias: Tensor | None,
    rotation: int,
    group: Sequence[int],
    activation: str,
    kernel: str,
) -> Tensor:
    out_features, in_features = weight.shape
    _check(x, weight)
    result_shape = (*x.shape[:-1], out_features)
    flat = x if x.ndim == 2 else x.reshape(-1, in_features)
    if not flat.shape[0] or not out_features:
        return x.new_empty(result_shape)
    call = LinearCall(
        rows=flat.shape[0],
        out_features=out_features,
        in_features=in_features,
        dtype=x.dtype,
        device=x.device,
        code_dtype=weight.dtype,
        scale_dtype=weight_scale.dtype,
        group=(group[0], group[1]),
        activation=activation,
        smoothing=smoothing is not None,
        rotation=rotation,
        bias=bias is not None,
    )
    result = choose(call, kernel).linear(
        call, flat, weight, weight_scale.view(call.grid), smoothing, bias
    )
    return result if x.ndim == 2 else result.view(result_shape)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dtype == weight.dtype != torch.float32:
        raise ValueError(
            f"a quantized linear cannot take {x.dtype}: what calls it casts its input to the dtype "
            "of the weight, which holds codes; protect the module in the recipe"
        )
    if not x.is_floating_point() or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"a linear of {weight.shape[1]} input features cannot take {list(x.shape)} of {x.dtype}"
        )


def _linear_shape(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    _check(x, weight)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _dequantize(
    weight: Tensor, weight_scale: Tensor, group: Sequence[int], dtype: torch.dtype
) -> Tensor:
    rows, columns = group
    grid = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    return dequantize_weight(weight, weight_scale.view(grid), (rows, columns), dtype)


def _dequantize_shape(
    weight: Tensor, weight_scale: Tensor, group: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


def _levels(
    weight: Tensor,
    zero_point: Tensor | None,
    columns: int,
    group: Sequence[int],
    format: str,
    packing: str,
    zero_point_packing: str,
) -> Tensor:
    if not packing:
        return _records(format).levels(weight, None, (group[0], group[1]))
    codes = unpack(weight, _PACKINGS[packing], columns)
    if format in _E2M1:
        return as_e4m3(codes)
    if zero_point is not None and zero_point_packing:
        rows = -(-len(weight) // group[0])
        zero_point = unpack_down(zero_point, _PACKINGS[zero_point_packing], rows)
    return get_format(format).levels(codes, zero_point, (group[0], group[1]))


@cache
def _records(format: str) -> RecordFormat:
    """A format of records; on a CPU its loops are compiled, if there is what compiles them."""
    return RECORD_FORMATS[format].compiled()


def _levels_shape(
    weight: Tensor,
    zero_point: Tensor | None,
    columns: int,
    group: Sequence[int],
    format: str,
    *_: object,
) -> Tensor:
    return weight.new_empty((weight.shape[0], columns), dtype=LEVEL_DTYPES[format])


def _scales(
    weight_scale: Tensor,
    second_scale: Tensor | None,
    offset: Tensor | None,
    offset_number: float | None,
    grid: Sequence[int],
    format: str,
    arrangement: str,
    reciprocal: bool,
) -> Tensor:
    rows, columns = grid
    if arrangement == "rows":
        scale = weight_scale.view(rows, columns)
    else:  # the same numbers, whatever shape a layout gives them
        tiles = weight_scale.view(padded(rows, TILE_ROWS), padded(columns, TILE_COLUMNS))
        scale = unswizzle(tiles, rows, columns)
    if second_scale is not None:
        if offset is None and offset_number is not None:
            offset = torch.full((1,), offset_number, device=scale.device)
        second = second_scale.view(-1)
        second = second.reciprocal() if reciprocal else second
        if format != "nf4":
            return multiplied(scale, second)
        if offset is None:
            raise ValueError("double-quantized scales need the mean that was taken off them")
        return decompress(scale, second, offset)
    result = torch.empty(scale.shape, device=scale.device)
    result.copy_(scale)
    return result.mul_(STEP) if format == "llm_int8" else result


def _scales_shape(
    weight_scale: Tensor,
    second_scale: Tensor | None,
    offset: Tensor | None,
    offset_number: float | None,
    grid: Sequence[int],
    *_: object,
) -> Tensor:
    return weight_scale.new_empty((grid[0], grid[1]), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, weight_scale, smoothing, bias, rotation, group, _, _ = inputs
    ctx.save_for_backward(weight, weight_scale, smoothing)
    ctx.rotation = rotation
    ctx.group = group
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input and bias; rounding activations to codes is passed straight through."""
    weight, weight_scale, smoothing = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        plain = torch.ops.quantrecipe.dequantize(weight, weight_scale, ctx.group, grad.dtype)
        grad_x = grad @ plain
        if smoothing is not None or ctx.rotation:
            # The matrix of a rotation is its own transpose.
            grad_x = turned(grad_x.to(torch.promote_types(grad.dtype, torch.float32)), ctx.rotation)
            grad_x = (grad_x if smoothing is None else grad_x / smoothing).to(grad.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.flatten(0, -2).sum(0) if grad.ndim > 1 else grad
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None, None


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_LIBRARY.impl("levels", _levels, "CompositeExplicitAutograd")
_LIBRARY.impl("scales", _scales, "CompositeExplicitAutograd")
torch.library.register_fake("quantrecipe::levels", _levels_shape, lib=_LIBRARY)
torch.library.register_fake("quantrecipe::scales", _scales_shape, lib=_LIBRARY)
torch.library.register_fake("quantrecipe::linear", _linear_shape, lib=_LIBRARY)
torch.library.register_fake("quantrecipe::dequantize", _dequantize_shape, lib=_LIBRARY)
torch.library.register_autograd("quantrecipe::linear", _backward, setup_context=_keep, lib=_LIBRARY)
