"""Reused memory: one stretch of bytes for each purpose, grown once, viewed as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from quantrecipe.formats import get_format
from quantrecipe.formats.blocks import TargetBlock
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.schema.schemes import AnyScaledWeight


class Buffers:
    """Scratch memory by purpose. A view is valid until the same purpose is asked for again.

    Args:
        device: where it lies.
        pinned: whether it is memory of the host that a GPU copies from and to by itself.
    """

    def __init__(self, device: str = "cpu", *, pinned: bool = False) -> None:
        self._device = device
        self._pinned = pinned
        self._bytes: dict[str, Tensor] = {}

    def view(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of ``shape`` and ``dtype`` in the memory kept for ``purpose``."""
        count = dtype.itemsize
        for dim in shape:
            count *= dim
        kept = self._bytes.get(purpose)
        if kept is None or kept.numel() < count:
            kept = torch.empty(
                count, dtype=torch.uint8, device=self._device, pin_memory=self._pinned
            )
            self._bytes[purpose] = kept
        return kept[:count].view(dtype).view(shape)


def target_block(
    memory: Buffers,
    weight: AnyScaledWeight,
    shape: tuple[int, int],
    scale: Tensor | None = None,
    encode_scales: Tensor | None = None,
) -> TargetBlock:
    """Memory for what a block transform writes: codes, scales, and zero points where there are any.

    Args:
        memory: where it lies.
        weight: how the block is stored.
        shape: of the block.
        scale: the scales, if they are known before the codes; they are handed on.
        encode_scales: those that codes are chosen by, if they are others; handed on too.
    """
    wide = shape[0], weight.code_columns(shape[1])
    codes = memory.view("codes out", wide, get_format(weight).code_dtype)
    grid = weight.scale_grid(*shape)
    if scale is None:
        scale = memory.view("scales out", grid, TORCH_DTYPES[weight.grid_dtype])
    zeros = memory.view("zeros out", grid, torch.uint8) if weight.has_zero_points else None
    return TargetBlock(codes, scale, zeros, encode_scales)
