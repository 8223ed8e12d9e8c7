"""INT8 linears on Hopper (compute capability 9.0): the host's side of ``hopper.cu``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Final

import torch
from torch import Tensor

from quantrecipe.loaders.kernels.gpus import gpu
from quantrecipe.loaders.kernels.nvrtc import (
    CudaFunction,
    Macros,
    byte_map,
    compile_cuda,
    is_available,
    pointer,
)

_ROWS: Final = 128  # of a tile, two warpgroups of 64
_THREADS: Final = 384
_KINDS: Final = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_HALVES: Final = (torch.bfloat16, torch.float16)
_SHARED_LIMIT: Final = 232448
_SM: Final = "sm_90a"


@dataclass(frozen=True, slots=True)
class HopperProduct:
    """How the product is cut up.

    Attributes:
        columns: of a tile (BN), a multiple of 16 up to 256; tiles have 128 rows.
        depth: bytes of a row that are loaded at a time (BK): 64 or 128.
        stages: loads that may be under way.
        cluster: blocks that share the columns of the weight.
        lag: loads by which the second half of a block follows the first.
        group: rows of tiles that are worked on together.
    """

    columns: int
    depth: int
    stages: int
    cluster: int
    lag: int
    group: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory: tiles, barriers, a staged result, scales and biases."""
        tiles = self.stages * (_ROWS + self.columns) * self.depth
        staged = _ROWS * (2 * self.columns + 16) + 8 * self.columns
        return 1024 + tiles + 16 * self.stages + staged

    def tiles(self, rows: int, out_features: int) -> int:
        """Tiles of a whole cluster in a product of this shape."""
        return -(-rows // (_ROWS * self.cluster)) * -(-out_features // self.columns)

    def runs(self, architecture: str) -> bool:
        """Whether the kernel can be cut up like this: what it assumes, and its shared memory."""
        return (
            architecture == "sm_90"
            and self.columns in range(16, 257, 16)
            and self.depth in (64, 128)
            and self.cluster in (1, 2)
            and self.group > 0
            # A stage is given back only when the next one is being multiplied.
            and 0 <= self.lag < self.stages
            and self.stages > 1
            and self.shared <= _SHARED_LIMIT
        )


CANDIDATES: Final = tuple(
    candidate
    for columns in (256, 240, 224, 208, 192, 176, 160, 144, 128)
    for depth, lag, cluster in ((64, 0, 2), (64, 2, 2), (128, 0, 2), (128, 1, 2), (128, 0, 1))
    for stages in (11, 10, 9, 8, 7, 6, 5, 4, 3)
    for candidate in (HopperProduct(columns, depth, stages, cluster, lag, 8),)
    if candidate.runs("sm_90") and not replace(candidate, stages=stages + 1).runs("sm_90")
)
"""What tuning tries: as many stages as fit, for each tile."""


def can_multiply(
    device: torch.device, dtype: torch.dtype, in_features: int, weight: Tensor | None = None
) -> bool:
    """Whether the product can be computed here: a Hopper GPU, 16-bit results, rows of 16 bytes."""
    return (
        dtype in _HALVES
        and in_features % 16 == 0
        and (weight is None or weight.data_ptr() % 16 == 0)
        and torch.cuda.get_device_capability(device) == (9, 0)
        and is_available()
    )


def can_quantize(x: Tensor) -> bool:
    """Whether activations can be quantized here: rows of whole groups of 16 bytes."""
    return (
        can_multiply(x.device, x.dtype, x.shape[1])
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
    )


@cache
def _source() -> str:
    return files("quantrecipe.loaders.kernels").joinpath("hopper.cu").read_text("utf-8")


@cache
def _function(name: str, macros: Macros, device: int, shared: int) -> CudaFunction:
    return CudaFunction(compile_cuda(_source(), macros, _SM), name, device, shared)


@cache
def _wgmma(columns: int) -> Macros:
    """The pieces of one instruction that multiplies 64 rows by this many columns."""
    registers = columns // 2
    names = ", ".join(f"%{index}" for index in range(registers))
    return (
        ("WGMMA_N", f'"{columns}"'),
        ("WGMMA_D", f'"{names}"'),
        ("WGMMA_A", f'"{registers}"'),
        ("WGMMA_B", f'"{registers + 1}"'),
        ("WGMMA_P", f'"{registers + 2}"'),
        ("WGMMA_OUT", ", ".join(f'"+r"(d[{index}])' for index in range(registers))),
    )


@cache
def _product_macros(
    config: HopperProduct,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    by_channel: bool,
    bias_dtype: torch.dtype | None,
) -> Macros:
    return (
        ("BF16", str(int(dtype == torch.bfloat16))),
        ("BN", str(config.columns)),
        ("BK", str(config.depth)),
        ("STAGES", str(config.stages)),
        ("CLUSTER", str(config.cluster)),
        ("LAG", str(config.lag)),
        ("BY_CHANNEL", str(int(by_channel))),
        ("SCALE", str(_KINDS[scale_dtype])),
        ("BIAS", str(_KINDS[bias_dtype])),
        *_wgmma(config.columns),
    )


def compile_product(config: HopperProduct) -> None:
    """Compile what a product in bfloat16 with float32 scales and no bias needs, into the cache."""
    compile_cuda(_source(), _product_macros(config, torch.bfloat16, torch.float32, True, None), _SM)


def product(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: HopperProduct,
) -> Tensor:
    """``scale * weight_scale * (codes @ weight.T) + bias``, ``[rows, out]``.

    Args:
        codes: int8 ``[rows, in]``, contiguous.
        scale: float32 ``[rows]``.
        weight: int8 ``[out, in]``, contiguous.
        weight_scale: ``[out]`` or one number, of any floating dtype but float64.
        bias: ``[out]``, of any floating dtype but float64.
        dtype: of the result: bfloat16 or float16.
        config: how it is cut up.
    """
    (rows, in_features), out_features = codes.shape, weight.shape[0]
    out = torch.empty(rows, out_features, dtype=dtype, device=codes.device)
    macros = _product_macros(
        config,
        dtype,
        weight_scale.dtype,
        weight_scale.numel() > 1,
        None if bias is None else bias.dtype,
    )
    device = codes.device.index
    tiles = config.tiles(rows, out_features)
    blocks = min(gpu(codes.device).multiprocessors // config.cluster, tiles) * config.cluster
    _function("scaled_product", macros, device, config.shared).launch(
        blocks,
        _THREADS,
        byte_map(codes.data_ptr(), rows, in_features, _ROWS, config.depth),
        byte_map(
            weight.data_ptr(),
            out_features,
            in_features,
            config.columns // config.cluster,
            config.depth,
        ),
        pointer(out),
        pointer(scale),
        pointer(weight_scale),
        pointer(bias),
        ctypes.c_int(rows),
        ctypes.c_int(out_features),
        ctypes.c_int(in_features),
        ctypes.c_int(config.group),
    )
    return out


@cache
def _vectors(in_features: int) -> tuple[int, int]:
    """Vectors of 8 numbers a thread holds, and threads of a block.

    The measured best: two vectors a thread for short rows, then four; rows that would need more
    are read twice.
    """
    whole = -(-in_features // 8)
    for vectors in (2, 4):
        threads = -(-whole // (32 * vectors)) * 32
        if threads <= 512:
            return vectors, threads
    return 0, 512


def quantize(x: Tensor, smoothing: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes ``[rows, in]`` and float32 scales ``[rows]`` of ``x / smoothing``, row by row."""
    rows, in_features = x.shape
    codes = torch.empty(rows, in_features, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    vectors, threads = _vectors(in_features)
    macros = (
        ("BF16", str(int(x.dtype == torch.bfloat16))),
        ("VECTORS", str(vectors)),
        ("SMOOTHING", str(int(smoothing is not None))),
    )
    _function("quantize_rows", macros, x.device.index, 0).launch(
        rows,
        threads,
        pointer(x),
        pointer(smoothing),
        pointer(codes),
        pointer(scale),
        ctypes.c_int(in_features),
        ctypes.c_longlong(x.stride(0)),
    )
    return codes, scale
