"""From one stored weight format to another, a row block at a time: the converter's inner loop.

Two implementations give the same codes, scales and refusals, bit for bit. The plain one takes the
steps of ``WeightFormat`` in torch, one after the other, on any device. The compiled one (extra
``fast``) takes them all in one pass over each row, on the CPU; it is tested against the plain one,
and hands over to it whatever it does not take: a block with a number that must be refused, a
tensor of another device. For scales of short runs in a row (``blockwise``) it is only measuring and
encoding that are compiled. Sums of errors have one order too (``error.sums_of_squares``).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from quantrecipe.formats import get_format
from quantrecipe.formats.blockwise import BlockwiseTransform, covers
from quantrecipe.formats.clip_search import choose_scales, column_weights
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.error import RowErrors, row_errors
from quantrecipe.formats.kernels import BlockSource, Scratch, decode_block, load_kernels, takes
from quantrecipe.formats.loops import load_loops
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

    A block is any run of rows that begins at a multiple of the row multiples of source and target
    (``WeightFormat.row_multiple``), contiguous, and as stored: codes ``[rows, in]`` in the dtype of
    the format, scales the rows of the canonical grid that belong to it, in the stored dtype.
    Nothing that is returned depends on how a weight is cut into blocks.
    """

    def __call__(
        self,
        codes_in: Tensor,
        scales_in: Tensor | None,
        factors: Tensor | None,
        codes_out: Tensor,
        scales_out: Tensor,
        importance: Tensor | None = None,
        *,
        zeros_in: Tensor | None = None,
        zeros_out: Tensor | None = None,
        encode_scales: Tensor | None = None,
    ) -> RowErrors:
        """Decode, multiply by the factors, rotate, choose scales, encode, measure the error.

        Args:
            codes_in: the source's codes or plain numbers.
            scales_in: the source's scales, finite; ``None`` for a plain dtype.
            factors: float32 ``[in]``, or ``None``.
            codes_out: receives the target's codes.
            scales_out: receives the target's scales. Where those of a weight are chosen together
                (``ScaledWeight.scales_together``) they are read, chosen from ``absmax`` over all
                blocks.
            importance: what each column's squared errors count for the quantizer, float32 ``[in]``;
                ``None``: all the same.
            zeros_in: the source's zero points, where its format has them.
            zeros_out: receives the target's zero points, where its format has them.
            encode_scales: the scales that codes are chosen by, where they are not those that codes
                are decoded with.

        Raises:
            NonFinite: a number of the source is none; carries its row and column in the block.
            ScaleOutOfRange: a scale overflows; carries its row and column in ``scales_out``.
        """

    def absmax(
        self,
        codes_in: Tensor,
        scales_in: Tensor | None,
        factors: Tensor | None,
        *,
        zeros_in: Tensor | None = None,
    ) -> Tensor:
        """The largest magnitude of each scaling group of the decoded, smoothed and rotated block.

        As ``WeightFormat.measure`` gives it: float32 ``[1, 1]`` where all of it has one scale.

        Raises:
            NonFinite: as above.
        """

    def column_absmax(
        self,
        codes_in: Tensor,
        scales_in: Tensor | None,
        out: Tensor,
        *,
        zeros_in: Tensor | None = None,
    ) -> None:
        """Raise ``out`` (float32 ``[in]``) to each decoded column's largest magnitude.

        A NaN in a column comes through, as does an infinity.

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


class PlainTransform:
    """``BlockTransform`` in torch, step by step.

    Args:
        source: how the weight is stored.
        target: how it shall be stored.
        rotation: what its columns are rotated by.
    """

    def __init__(
        self, source: AnyWeight, target: AnyScaledWeight, rotation: Hadamard | None = None
    ) -> None:
        self.source = source
        self.target = target
        self.rotation = rotation
        self.format = get_format(target)
        self._scratch = Scratch()

    def __call__(
        self,
        codes_in: Tensor,
        scales_in: Tensor | None,
        factors: Tensor | None,
        codes_out: Tensor,
        scales_out: Tensor,
        importance: Tensor | None = None,
        *,
        zeros_in: Tensor | None = None,
        zeros_out: Tensor | None = None,
        encode_scales: Tensor | None = None,
    ) -> RowErrors:
        weight = self.decode(codes_in, scales_in, factors, zeros_in)
        fmt, target, workspace = self.format, self.target, self._scratch.steps
        given = target.scales_together
        if not given:
            scales, zeros = choose_scales(
                weight, fmt, target, importance, codes=codes_out, workspace=workspace
            )
            scales_out.copy_(scales)
            if zeros is not None and zeros_out is not None:
                zeros_out.copy_(zeros)
        fmt.encode(
            weight,
            scales_out if encode_scales is None else encode_scales,
            target,
            codes_out,
            zero_point=zeros_out,
            workspace=workspace,
            checked=given,
        )
        # What has just been encoded are numbers: nothing waits for the device to say so.
        return row_errors(
            weight,
            codes_out,
            scales_out,
            fmt,
            target,
            workspace,
            zero_point=zeros_out,
            checked=False,
        )

    def absmax(
        self,
        codes_in: Tensor,
        scales_in: Tensor | None,
        factors: Tensor | None,
        *,
        zeros_in: Tensor | None = None,
    ) -> Tensor:
        weight = self.decode(codes_in, scales_in, factors, zeros_in)
        return self.format.measure(weight, self.target)

    def column_absmax(
        self,
        codes_in: Tensor,
        scales_in: Tensor | None,
        out: Tensor,
        *,
        zeros_in: Tensor | None = None,
    ) -> None:
        weight = decode_block(
            self.source, codes_in, scales_in, None, None, self._scratch.values, zeros_in
        )
        torch.maximum(out, weight.amax(0), out=out)
        torch.maximum(out, weight.amin(0).neg_(), out=out)

    def decode(
        self,
        codes: Tensor,
        scales: Tensor | None,
        factors: Tensor | None,
        zeros: Tensor | None,
    ) -> Tensor:
        """The source's numbers as codes are computed from, in memory that the next call reuses."""
        return decode_block(
            self.source, codes, scales, factors, self.rotation, self._scratch.values, zeros
        )


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
        self._source = BlockSource(plain.source, plain.rotation, kernels.KINDS[plain.source.format])
        self._itemsize = TORCH_DTYPES[plain.source.format].itemsize
        quantizer = plain.target.quantizer
        self._ratios = (
            np.array(quantizer.ratios(), np.float32) if isinstance(quantizer, ClipSearch) else None
        )

    def __call__(
        self,
        codes_in: Tensor,
        scales_in: Tensor | None,
        factors: Tensor | None,
        codes_out: Tensor,
        scales_out: Tensor,
        importance: Tensor | None = None,
        *,
        zeros_in: Tensor | None = None,
        zeros_out: Tensor | None = None,
        encode_scales: Tensor | None = None,
    ) -> RowErrors:
        block = self._source.arguments(codes_in, scales_in, factors)
        scales = self._scales(codes_in, codes_out, scales_out)
        if block is not None and scales is not None and self._search(block, scales, importance):
            rows, columns = codes_in.shape
            signal, noise = np.empty(rows), np.empty(rows)
            chosen = self._given or self._ratios is not None
            phase = self._kernels.ENCODE if chosen else self._kernels.MEASURE
            target = self._target
            worst = self._kernels.transform(
                *block,
                phase,
                self._kernels.ENCODE,
                self._kernels.KINDS[target.format],
                codes_out.view(torch.uint8).numpy(),
                self._kernels.KINDS[target.scale_dtype],
                scales.numpy(),
                *target.group_shape(rows, columns),
                signal,
                noise,
            )
            if worst != self._kernels.REFUSED:
                if not self._given:
                    scales_out.copy_(scales)
                return RowErrors(torch.from_numpy(signal), torch.from_numpy(noise), float(worst))
        return self._plain(codes_in, scales_in, factors, codes_out, scales_out, importance)

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

    def absmax(
        self,
        codes_in: Tensor,
        scales_in: Tensor | None,
        factors: Tensor | None,
        *,
        zeros_in: Tensor | None = None,
    ) -> Tensor:
        block = self._source.arguments(codes_in, scales_in, factors)
        if block is not None:
            kernels, amax, none = self._kernels, torch.empty(1, 1), np.empty(0)
            largest = kernels.transform(
                *block,
                kernels.MEASURE,
                kernels.MEASURE,
                kernels.INT8,
                np.empty((0, codes_in.shape[1]), np.uint8),
                kernels.FLOAT32,
                amax.numpy(),
                *codes_in.shape,
                none,
                none,
            )
            if largest != kernels.REFUSED:
                return amax
        return self._plain.absmax(codes_in, scales_in, factors)

    def column_absmax(
        self,
        codes_in: Tensor,
        scales_in: Tensor | None,
        out: Tensor,
        *,
        zeros_in: Tensor | None = None,
    ) -> None:
        block = self._source.arguments(codes_in, scales_in, None)
        if block is not None and takes(out, torch.float32, (codes_in.shape[1],)):
            kind, codes, scales, height, width, *_ = block
            maxima = out.clone()
            if self._kernels.column_absmax(kind, codes, scales, height, width, maxima.numpy()):
                out.copy_(maxima)
                return
        self._plain.column_absmax(codes_in, scales_in, out)

    def _scales(self, codes_in: Tensor, codes_out: Tensor, scales_out: Tensor) -> Tensor | None:
        """float32 of the grid's shape, those that are given, or ``None``: for the plain path."""
        grid = self._target.scale_grid(*codes_in.shape)
        if not takes(codes_out, self._code_dtype, tuple(codes_in.shape)):
            return None
        if not takes(scales_out, self._scale_dtype, grid):
            return None
        if not self._given:
            return torch.empty(grid)
        scale = float(scales_out)
        return scales_out.float() if 0 < scale < float("inf") else None
