"""Quantizing one module's weight for the sake of its errors, a row block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantrecipe.checkpoint import SourceReader
from quantrecipe.converter.activations import as_quantized, prepared
from quantrecipe.converter.buffers import Buffers, target_block
from quantrecipe.converter.calibration import ModuleStatistics
from quantrecipe.converter.given_scales import GivenScales
from quantrecipe.converter.protocol import DEFAULT_BLOCK_BYTES, Progress, silent
from quantrecipe.converter.ranking.noise import Powers, WeightColumns
from quantrecipe.converter.refusals import naming
from quantrecipe.converter.source_rows import SourceRows
from quantrecipe.converter.units import row_blocks, rows_together
from quantrecipe.formats import dequantize, get_format
from quantrecipe.formats.rotation import rotate_
from quantrecipe.formats.transform import BlockTransform, block_transform
from quantrecipe.schema.plan import PlannedModule
from quantrecipe.schema.schemes import AnyScaledWeight, DynamicActivation, PlainWeight


@dataclass(frozen=True, slots=True)
class Errors:
    """What quantizing a module costs.

    Attributes:
        columns: of its weight.
        powers: of its outputs on the tokens that were kept; ``None`` without any.
    """

    columns: WeightColumns
    powers: Powers | None


def measure(
    module: PlannedModule,
    reader: SourceReader,
    buffers: Buffers,
    inputs: ModuleStatistics | None,
    factors: Tensor | None,
    importance: Tensor | None = None,
    *,
    compiled: bool = False,
    progress: Progress = silent,
) -> Errors:
    """Quantize a module as a converter does, and compare.

    Memory is that of row blocks, and of the outputs of the tokens that were kept for a block.

    Args:
        module: quantized by its scheme.
        reader: of the source.
        buffers: scratch memory of this thread.
        inputs: its inputs; ``None`` if they were not measured.
        factors: smoothing factors, float32 ``[in]``.
        importance: what each column's errors count for the quantizer, float32 ``[in]``.
        compiled: whether compiled loops are worth starting.
        progress: told of the bytes of weight that are done with.

    Raises:
        InvalidInput: a number of the source is none, or a scale is too large.
    """
    assert not isinstance(module.weight, PlainWeight)
    rows = SourceRows(module.source, reader, buffers)
    work = _Work(module, module.weight, rows, buffers)
    transform = block_transform(
        rows.format,
        module.weight,
        rotation=module.rotation,
        prefer_compiled=compiled,
    )
    tokens = None if inputs is None else inputs.tokens_kept()
    kept = None
    if tokens is not None and len(tokens):
        kept = _Kept(prepared(tokens, factors, module.rotation_size), module.activation)
    columns = module.source.in_features
    signal, noise, rotated = torch.zeros(3, columns, dtype=torch.float64)
    row_bytes = module.source.tensors["weight"].nbytes // module.source.out_features
    for start, stop, weight, hat in work.blocks(transform, factors, importance):
        if module.rotation is None:
            signal += _column_squares(weight)
        else:
            rotated += _column_squares(weight)
            # Rotated twice, it is what it was.
            signal += _column_squares(rotate_(weight.clone(), module.rotation.size))
        if kept is not None:
            kept.add(weight, hat)
        noise += _column_squares(hat.sub_(weight))
        progress((stop - start) * row_bytes, module.name)
    powers = None
    if kept is not None and inputs is not None:
        powers = kept.powers(len(inputs.input_absmax), inputs.input_token_bins)
    return Errors(
        WeightColumns(signal, noise, None if module.rotation is None else rotated), powers
    )


class _Work:
    """A module's weight and its error, block by block."""

    def __init__(
        self, module: PlannedModule, weight: AnyScaledWeight, rows: SourceRows, buffers: Buffers
    ) -> None:
        self.module = module
        self.weight = weight
        self.rows = rows
        self.buffers = buffers

    def _ranges(self) -> Iterator[tuple[int, int]]:
        source = self.module.source
        multiple = rows_together(self.module)
        return row_blocks(0, source.out_features, source.in_features, multiple, DEFAULT_BLOCK_BYTES)

    def blocks(
        self, transform: BlockTransform, factors: Tensor | None, importance: Tensor | None
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """First row, row after the last, smoothed and rotated weight, what stands for it."""
        source, weight = self.module.source, self.weight
        info, fmt = source.tensors["weight"], get_format(weight)
        given = self._given(transform, factors) if weight.scales_together else None
        for start, stop in self._ranges():
            shape = (stop - start, source.in_features)
            block = self.rows.stored(start, stop, factors)
            scales = () if given is None else given.rows(start, stop)
            target = target_block(self.buffers, weight, shape, *scales)
            with naming(info, start, start // fmt.row_multiple(weight)):
                transform(block, target, importance)
                wanted = dequantize(
                    block.codes, block.scales, self.rows.format, zero_point=block.zeros
                )
            if factors is not None:
                wanted = wanted * factors
            if self.module.rotation is not None:
                wanted = rotate_(wanted.clone(), self.module.rotation.size)
            hat = dequantize(target.codes, target.scales, weight, zero_point=target.zeros)
            yield start, stop, wanted, hat

    def _given(self, transform: BlockTransform, factors: Tensor | None) -> GivenScales:
        info = self.module.source.tensors["weight"]
        maxima = []
        for start, stop in self._ranges():
            with naming(info, start):
                maxima.append(transform.absmax(self.rows.stored(start, stop, factors)))
        with naming(info):
            return GivenScales.of(maxima, self.weight)


class _Kept:
    """Powers of the outputs of tokens, over row blocks of the weight.

    Args:
        tokens: smoothed, float32 ``[K, in]``.
        activation: how they are quantized.
    """

    def __init__(self, tokens: Tensor, activation: DynamicActivation | None) -> None:
        self._tokens = tokens
        self._rounded = as_quantized(tokens, activation)
        self._signal, self._noise = torch.zeros(2, len(tokens), dtype=torch.float64)

    def add(self, weight: Tensor, hat: Tensor) -> None:
        """Outputs of more rows of the weight, and of what stands for it.

        float32 rounds them to about 120 dB, far below what quantizing does.
        """
        outputs = self._tokens @ weight.T
        self._signal += outputs.double().square_().sum(1)
        self._noise += (self._rounded @ hat.T).sub_(outputs).double().square_().sum(1)

    def powers(self, bins: int, of: Tensor | None) -> Powers:
        """Means over tokens, for each timestep bin."""
        place = torch.zeros(len(self._tokens), dtype=torch.int64) if of is None else of
        count = torch.bincount(place, minlength=bins).double()
        signal, noise = (
            torch.zeros(bins, dtype=torch.float64).index_add_(0, place, values) / count.clamp(min=1)
            for values in (self._signal, self._noise)
        )
        return Powers(count / count.sum(), signal, noise)


def _column_squares(block: Tensor) -> Tensor:
    """The sum of squares of each column, float64."""
    # A norm along rows takes several times as long on a CPU.
    return block.double().square_().sum(0)
