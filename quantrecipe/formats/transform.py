"""From one stored weight format to another, a row block at a time: the converter's inner loop.

Two implementations give the same codes, scales and refusals, bit for bit. The plain one takes the
steps of ``WeightFormat`` in torch, one after the other, on any device. The compiled one (extra
``fast``) takes them all in one pass over each row, on the CPU; it is tested against the plain one,
and hands over to it whatever it does not take: a block with a number that must be refused, a
tensor of another device. For scales of short runs in a row (``blockwise``) it is only measuring and
encoding that are compiled. Sums of errors have one order too (``error.sums_of_squares``).
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from quantrecipe.formats import get_format
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.blockwise import BlockwiseTransform, covers
from quantrecipe.formats.clip_search import column_weights
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.error import RowErrors
from quantrecipe.formats.kernels import (
    SourceArguments,
    load_kernels,
    takes,
)
from quantrecipe.formats.loops import load_loops
from quantrecipe.formats.plain_transform import PlainTransform
from quantrecipe.formats.records import RecordFormat
from quantrecipe.formats.recordwise import RecordTransform
from quantrecipe.schema.schemes import AnyScaledWeight, AnyWeight, ClipSearch, Hadamard

COMPILED_PAYS_FROM_BYTES: Final = 1_000_000_000
"""Bytes of source weights from which the compiled path is worth starting.

Loading it takes about 1 s (importing numba, reading its cache) and saves about 1 s a gigabyte of
bfloat16 on one core. The first time on a machine it compiles for about 10 s instead.
"""


class BlockTransform(Protocol):
    """Row blocks of one weight, from source to target. Threads may share it.

    Blocks are cut as ``blocks`` says; nothing that is returned depends on how.
    """

    def __call__(
        self, source: SourceBlock, target: TargetBlock, importance: Tensor | None = None
    ) -> RowErrors:
        """Decode, multiply by the factors, rotate, choose scales, encode, measure the error.

        Args:
            source: what is read.
            target: receives codes, scales and zero points.
            importance: what each column's squared errors count for the quantizer, float32 ``[in]``;
                ``None``: all the same.

        Raises:
            NonFinite: a number of the source is none; carries its row and column in the block.
            ScaleOutOfRange: a scale overflows; carries its row and column in the grid.
        """

    def absmax(self, source: SourceBlock) -> Tensor:
        """The largest magnitude of each scaling group of the decoded, smoothed and rotated block.

        As ``WeightFormat.measure`` gives it: float32 ``[1, 1]`` where all of it has one scale.

        Raises:
            NonFinite: as above.
        """

    def column_absmax(self, source: SourceBlock, out: Tensor) -> None:
        """Raise ``out`` (float32 ``[in]``) to each decoded column's largest magnitude.

        The block's factors are left out: it is from these maxima that factors are chosen. A NaN in
        a column comes through, as does an infinity.

        Raises:
            NonFinite: a code or a product with its scale is no finite number.
        """


def block_transform(
    source: AnyWeight,
    target: AnyScaledWeight,
    *,
    rotation: Hadamard | None = None,
    prefer_compiled: bool = True,
) -> BlockTransform:
    """The transform between two formats, to be chosen once a weight.

    The compiled one, if it is preferred, can be imported, and covers both formats.

    Args:
        source: how the weight is stored.
        target: how it shall be stored.
        rotation: what its columns are rotated by, once they are smoothed.
        prefer_compiled: whether compiled loops are worth their start.
    """
    plain = PlainTransform(source, target, rotation)
    if prefer_compiled and isinstance(plain.format, RecordFormat):
        plain.format = plain.format.compiled()
    kernels = load_kernels() if prefer_compiled else None
    if kernels is None:
        return plain
    if {source.format, target.format} <= set(kernels.KINDS):
        return CompiledTransform(plain, kernels)
    loops = load_loops("compiled_blocks")
    if loops is not None and isinstance(plain.format, RecordFormat):
        return RecordTransform(plain, loops, kernels)
    if loops is not None and covers(target, loops):
        return BlockwiseTransform(plain, loops, kernels)
    return plain


class CompiledTransform:
    """``BlockTransform`` in compiled loops, for tensors in the CPU's memory.

    Args:
        plain: the same transform, for what this one does not take.
        kernels: ``quantrecipe.formats.compiled``.
    """

    def __init__(self, plain: PlainTransform, kernels: ModuleType) -> None:
        self._plain = plain
        self._kernels = kernels
        self._target = plain.target
        self._given = plain.target.scales_together
        self._code_dtype = get_format(plain.target).code_dtype
        self._scale_dtype = TORCH_DTYPES[plain.target.grid_dtype]
        self._source = SourceArguments(
            plain.source, plain.rotation, kernels.KINDS[plain.source.format]
        )
        self._itemsize = TORCH_DTYPES[plain.source.format].itemsize
        quantizer = plain.target.quantizer
        self._ratios = (
            np.array(quantizer.ratios(), np.float32) if isinstance(quantizer, ClipSearch) else None
        )

    def __call__(
        self, source: SourceBlock, target: TargetBlock, importance: Tensor | None = None
    ) -> RowErrors:
        block, codes = self._source.of(source), target.codes
        scales = self._scales(source.codes, target)
        if block is not None and scales is not None and self._search(block, scales, importance):
            rows, columns = source.codes.shape
            signal, noise = np.empty(rows), np.empty(rows)
            chosen = self._given or self._ratios is not None
            phase = self._kernels.ENCODE if chosen else self._kernels.MEASURE
            spec = self._target
            worst = self._kernels.transform(
                *block,
                phase,
                self._kernels.ENCODE,
                self._kernels.KINDS[spec.format],
                codes.view(torch.uint8).numpy(),
                self._kernels.KINDS[spec.scale_dtype],
                scales.numpy(),
                *spec.group_shape(rows, columns),
                signal,
                noise,
            )
            if worst != self._kernels.REFUSED:
                if not self._given:
                    target.scales.copy_(scales)
                return RowErrors(torch.from_numpy(signal), torch.from_numpy(noise), float(worst))
        return self._plain(source, target, importance)

    def _search(self, block: tuple[Any, ...], scales: Tensor, importance: Tensor | None) -> bool:
        """Choose ``scales`` by search, if they are; false if the plain path shall look at it."""
        if self._ratios is None:
            return True
        kernels, target, codes = self._kernels, self._target, block[1]
        rows, columns = codes.shape[0], codes.shape[1] // self._itemsize
        if importance is not None and not takes(importance, torch.float32, (columns,)):
            return False
        group = target.group_shape(rows, columns)
        counts = column_weights(importance, torch.empty(0, columns), group)
        found: bool = kernels.clip_search(
            *block,
            kernels.KINDS[target.format],
            kernels.KINDS[target.scale_dtype],
            self._ratios,
            counts.numpy(),
            scales.numpy(),
            *group,
        )
        return found

    def absmax(self, source: SourceBlock) -> Tensor:
        block = self._source.of(source)
        if block is not None:
            kernels, amax, none = self._kernels, torch.empty(1, 1), np.empty(0)
            largest = kernels.transform(
                *block,
                kernels.MEASURE,
                kernels.MEASURE,
                kernels.INT8,
                np.empty((0, source.codes.shape[1]), np.uint8),
                kernels.FLOAT32,
                amax.numpy(),
                *source.codes.shape,
                none,
                none,
            )
            if largest != kernels.REFUSED:
                return amax
        return self._plain.absmax(source)

    def column_absmax(self, source: SourceBlock, out: Tensor) -> None:
        block = self._source.of(replace(source, factors=None))
        if block is not None and takes(out, torch.float32, (source.codes.shape[1],)):
            kind, codes, scales, height, width, *_ = block
            maxima = out.clone()
            if self._kernels.column_absmax(kind, codes, scales, height, width, maxima.numpy()):
                out.copy_(maxima)
                return
        self._plain.column_absmax(source, out)

    def _scales(self, codes_in: Tensor, target: TargetBlock) -> Tensor | None:
        """float32 of the grid's shape, those that are given, or ``None``: for the plain path."""
        grid = self._target.scale_grid(*codes_in.shape)
        if not takes(target.codes, self._code_dtype, tuple(codes_in.shape)):
            return None
        if not takes(target.scales, self._scale_dtype, grid):
            return None
        if not self._given:
            return torch.empty(grid)
        scale = float(target.scales)
        return target.scales.float() if 0 < scale < float("inf") else None
