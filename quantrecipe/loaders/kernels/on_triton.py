"""The kernel for NVIDIA GPUs: Triton everywhere, and CUDA C++ for Hopper's own instructions."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quantrecipe.loaders.kernels import hopper
from quantrecipe.loaders.kernels.arithmetic import quantize_activations, smoothed
from quantrecipe.loaders.kernels.call import LinearCall
from quantrecipe.loaders.kernels.configs import Product, TritonProduct, product_config
from quantrecipe.loaders.kernels.gpus import gpu

_FEW_ROWS = 64
"""Up to this many, a weight-only product reads codes; above, dequantizing once is faster."""


@cache
def _code() -> ModuleType:
    from quantrecipe.loaders.kernels import triton_code

    return triton_code


class TritonKernel:
    """W8A8 and weight-only linears with a scale for each row of the weight, or one for all.

    Activations are read once, divided by their smoothing factors and quantized; then int8 codes are
    multiplied, and scales and bias applied to the int32 sums in registers. On Hopper the product
    runs on asynchronous tensor core instructions.
    """

    name = "triton"

    def refuses(self, call: LinearCall) -> str | None:
        if call.device.type != "cuda" or torch.version.hip is not None:
            return "it runs on NVIDIA GPUs"
        if find_spec("triton") is None:
            return "Triton is not installed"
        if torch.cuda.get_device_capability(call.device) < (8, 0):
            return "it needs a GPU of compute capability 8.0 or newer"
        if call.dtype == torch.float64:
            return "it does not compute in float64"
        if call.code_dtype == torch.float32:
            return "it multiplies codes, and those of this format stand for numbers of a table"
        if not call.by_row:
            return "it wants one scale for each row of the weight, or one for all"
        if call.activation and not call.is_w8a8:
            return "of quantized activations it knows int8 beside int8 weights"
        if call.code_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability(
            call.device
        ) < (8, 9):
            return "float8_e4m3fn needs a GPU of compute capability 8.9 or newer"
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
        with torch.cuda.device(call.device):
            if call.rotation:
                # Codes are made from float32; a product with numbers takes them as it would any.
                x = smoothed(x, smoothing, call.rotation)
                x, smoothing = x if call.is_w8a8 else x.to(call.dtype), None
            if call.is_w8a8:
                codes, scale = _quantize(call, x, smoothing)
                config = config_for(call.rows, weight, call.dtype)
                return multiply(codes, scale, weight, weight_scale, bias, call.dtype, config)
            if call.rows <= _FEW_ROWS:
                return _product_with_codes(call, x, weight, weight_scale, smoothing, bias)
            plain = _dequantize(call, weight, weight_scale)
            values = x if smoothing is None else smoothed(x, smoothing).to(call.dtype)
            added = None if bias is None else bias.to(call.dtype)
            return torch.nn.functional.linear(values, plain, added)


def config_for(rows: int, weight: Tensor, dtype: torch.dtype) -> Product:
    """How the product of so many rows of codes with a weight is cut up on the weight's GPU.

    Args:
        rows: of the activations.
        weight: int8 ``[out, in]``.
        dtype: of the result.
    """
    out_features, in_features = weight.shape
    found = gpu(weight.device)
    can = hopper.can_multiply(weight.device, dtype, in_features, weight)
    return product_config(
        found.architecture, found.multiprocessors, rows, out_features, in_features, can
    )


def multiply(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: Product,
) -> Tensor:
    """``scale * weight_scale * (codes @ weight.T) + bias``, ``[rows, out]`` of ``dtype``.

    Args:
        codes: int8 ``[rows, in]``, contiguous.
        scale: float32 ``[rows]``.
        weight: int8 ``[out, in]``, contiguous.
        weight_scale: ``[out, 1]`` or ``[1, 1]``.
        bias: ``[out]``.
        dtype: of the result.
        config: how it is cut up.
    """
    if weight_scale.dtype == torch.float64:
        weight_scale = weight_scale.float()
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.float()
    if isinstance(config, TritonProduct):
        return _triton_product(codes, scale, weight, weight_scale, bias, dtype, config)
    return hopper.product(codes, scale, weight, weight_scale, bias, dtype, config)


def _quantize(call: LinearCall, x: Tensor, smoothing: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes, and a float32 scale for each row, ``[rows]``."""
    if call.activation != "int8:token":
        codes, scale = quantize_activations(smoothed(x, smoothing), call.activation)
        return codes.contiguous(), scale.expand(call.rows, 1).contiguous().view(-1)
    if hopper.can_quantize(x):
        return hopper.quantize(x, smoothing)
    codes = torch.empty(call.rows, call.in_features, dtype=torch.int8, device=call.device)
    scale = torch.empty(call.rows, dtype=torch.float32, device=call.device)
    if x.stride(1) != 1:
        x = x.contiguous()
    shared = {"SMOOTHING": smoothing is not None}
    if call.in_features > 16384:
        _code().quantize_long_row[(call.rows,)](
            x,
            smoothing,
            codes,
            scale,
            call.in_features,
            x.stride(0),
            BLOCK=2048,
            num_warps=4,
            **shared,
        )
    else:
        first, second = covering(call.in_features)
        _code().quantize_rows[(call.rows,)](
            x,
            smoothing,
            codes,
            scale,
            call.rows,
            call.in_features,
            x.stride(0),
            FIRST=first,
            SECOND=second,
            ROWS=1,
            num_warps=4 if call.in_features <= 8192 else 8,
            **shared,
        )
    return codes, scale


def covering(length: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) whose sum covers ``length`` closely."""
    first = 1 << (length.bit_length() - 1)
    if first == length:
        return first, 0
    second = 1 << (length - first - 1).bit_length()
    return (first, second) if second < first else (2 * first, 0)


def _triton_product(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: TritonProduct,
) -> Tensor:
    (rows, in_features), out_features = codes.shape, weight.shape[0]
    out = torch.empty(rows, out_features, dtype=dtype, device=codes.device)
    blocks = -(-rows // config.rows) * -(-out_features // config.columns)
    _code().scaled_product[(blocks,)](
        codes,
        weight,
        out,
        scale,
        weight_scale,
        bias,
        rows,
        out_features,
        in_features,
        BY_CHANNEL=weight_scale.numel() > 1,
        BIAS=bias is not None,
        EVEN_K=in_features % config.depth == 0,
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        BLOCK_K=config.depth,
        GROUP=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def _product_with_codes(
    call: LinearCall,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    smoothing: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    out = torch.empty(call.rows, call.out_features, dtype=call.dtype, device=call.device)
    if x.stride(1) != 1:
        x = x.contiguous()
    block_m = 16 if call.rows <= 16 else 64
    wide: dict[str, Any] = {"BLOCK_N": 32, "BLOCK_K": 128 if call.dtype != torch.float32 else 64}
    grid = (-(-call.out_features // wide["BLOCK_N"]), -(-call.rows // block_m))
    _code().product_with_codes[grid](
        x,
        weight,
        out,
        smoothing,
        weight_scale,
        bias,
        call.rows,
        call.out_features,
        call.in_features,
        x.stride(0),
        BY_CHANNEL=weight_scale.numel() > 1,
        BIAS=bias is not None,
        SMOOTHING=smoothing is not None,
        BLOCK_M=block_m,
        num_warps=4,
        num_stages=4,
        **wide,
    )
    return out


def _dequantize(call: LinearCall, weight: Tensor, weight_scale: Tensor) -> Tensor:
    plain = torch.empty(weight.shape, dtype=call.dtype, device=call.device)
    block = 2048
    _code().dequantize_rows[(call.out_features, -(-call.in_features // block))](
        weight,
        weight_scale,
        plain,
        call.out_features,
        call.in_features,
        BY_CHANNEL=weight_scale.numel() > 1,
        BLOCK=block,
        num_warps=4,
    )
    return plain
