"""What ``transform`` and ``proof`` share: reading their source, in torch and for compiled loops."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantrecipe.formats import get_format, to_float32
from quantrecipe.formats.base import Workspace
from quantrecipe.formats.blocks import SourceBlock
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.loops import load_loops
from quantrecipe.formats.refusals import all_finite, refuse_non_finite
from quantrecipe.formats.rotation import rotate_
from quantrecipe.schema.schemes import (
    AnyScaledWeight,
    AnyWeight,
    Hadamard,
    PlainWeight,
    ScaledWeight,
)


def load_kernels() -> ModuleType | None:
    """``quantrecipe.formats.compiled``, if it can be had here."""
    return load_loops("compiled")


class Scratch(threading.local):
    """Memory for steps in torch, one a thread."""

    def __init__(self) -> None:
        self.values = Workspace()
        self.steps = Workspace()


def decode_block(
    source: AnyWeight, block: SourceBlock, rotation: Hadamard | None, workspace: Workspace
) -> Tensor:
    """A stored block as float32, smoothed, then rotated, in the memory of ``workspace``.

    Raises:
        Unrepresentable: a number is not finite, or beyond float32.
    """
    codes, scales = block.codes, block.scales
    if isinstance(source, PlainWeight):
        weight = workspace.like(codes)
        to_float32(codes, out=weight)
    else:
        weight = workspace.shaped((len(codes), source.number_columns(codes.shape[1])), codes.device)
        if scales is None:
            raise ValueError("codes without a scale are no numbers")
        get_format(source).decode(codes, scales, source, out=weight, zero_point=block.zeros)
    if block.factors is not None:
        weight.mul_(block.factors)
    if rotation is None:
        return weight
    # Here it still has its own column: rotated it would spoil a block of them.
    if not all_finite(weight):
        refuse_non_finite(weight)
    return rotate_(weight, rotation.size)


class PlainSteps:
    """What a transform and a proof in torch begin with. Threads may share it.

    Args:
        source: how the weight is stored.
        target: how it shall be stored.
        rotation: what its columns are rotated by, once they are smoothed.
    """

    def __init__(
        self, source: AnyWeight, target: AnyScaledWeight, rotation: Hadamard | None = None
    ) -> None:
        self.source = source
        self.target = target
        self.rotation = rotation
        self.format = get_format(target)
        self._scratch = Scratch()

    def decode(self, block: SourceBlock) -> Tensor:
        """The numbers that codes are computed from, in memory that the next call reuses."""
        return decode_block(self.source, block, self.rotation, self._scratch.values)


class SourceArguments:
    """What the kernels are told of a block's source."""

    def __init__(self, weight: AnyWeight, rotation: Hadamard | None, kind: int) -> None:
        self._weight = weight
        self._rotation = 0 if rotation is None else rotation.size
        self._kind = kind
        self._dtype = TORCH_DTYPES[
            weight.code_dtype if isinstance(weight, ScaledWeight) else weight.format
        ]

    def of(self, block: SourceBlock) -> tuple[Any, ...] | None:
        """The kernels' first arguments; ``None`` for a block that the plain path shall look at."""
        codes, scales, factors = block.codes, block.scales, block.factors
        shape = tuple(codes.shape)
        if len(shape) != 2 or not codes.numel() or not takes(codes, self._dtype, shape):
            return None
        if factors is not None and not takes(factors, torch.float32, shape[1:]):
            return None
        smoothing: NDArray[np.float32] = _NONE if factors is None else factors.numpy()
        stored = codes.view(torch.uint8).numpy()
        weight = self._weight
        if not isinstance(weight, ScaledWeight):
            return self._kind, stored, _ONE, *shape, smoothing, self._rotation
        dtype = scales.dtype if scales is not None else torch.float32
        if scales is None or not takes(scales, dtype, weight.scale_grid(*shape)):
            return None
        group = weight.group_shape(*shape)
        return self._kind, stored, scales.float().numpy(), *group, smoothing, self._rotation


_NONE: Final = np.empty(0, np.float32)
_ONE: Final = np.ones((1, 1), np.float32)


def takes(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether the kernels, which check nothing, may be given the memory of ``tensor``."""
    return (
        tensor.dtype == dtype
        and tuple(tensor.shape) == shape
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
    )
