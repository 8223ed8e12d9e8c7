"""Reused memory: one stretch of bytes for each purpose, grown once, viewed as tensors."""

from __future__ import annotations

import torch
from torch import Tensor


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
