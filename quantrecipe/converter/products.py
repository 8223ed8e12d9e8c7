"""How far quantizing both sides of a product leads, on tokens that were kept.

A choice among candidates must not depend on the order in which a matrix product adds up, which is
another on each device and for each size of block. So products are exact: both sides are rounded to
whole numbers of so few bits that float64 holds every sum of their products. What that rounds away
is about ``2^-18`` of the largest number of a row, far less than any format here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from quantrecipe.converter.activations import as_quantized, prepared
from quantrecipe.converter.buffers import target_block
from quantrecipe.converter.devices import Device
from quantrecipe.converter.given_scales import GivenScales
from quantrecipe.converter.refusals import naming
from quantrecipe.converter.source_rows import SourceRows
from quantrecipe.converter.units import row_blocks, rows_together
from quantrecipe.formats import get_format
from quantrecipe.formats.blocks import SourceBlock
from quantrecipe.formats.error import sums_of_squares
from quantrecipe.formats.transform import BlockTransform, block_transform
from quantrecipe.schema.plan import PlannedModule
from quantrecipe.schema.schemes import AnyScaledWeight, PlainWeight
from quantrecipe.schema.tensors import TensorInfo

_FLOAT64_BITS: Final = 53


class ProductErrors:
    """The output error of one module for each of several smoothing factors.

    ``sum (x W^T - Q(x / s) Q(W diag(s))^T)^2`` over tokens and output features, with the scheme's
    own quantizers of weights and activations.

    Args:
        module: the module.
        rows: its weight.
        tokens: float32 ``[tokens, in]``, finite.
        measured_as: the tensor that they were read from.
        candidates: float32 ``[candidates, in]``, the factors.
        importances: for each candidate what columns count for the quantizer, float32 ``[in]``, or
            ``None``.
        device: where to compute.
        block_bytes: about how many bytes of float32 weights to hold at a time.
        compiled: whether compiled loops are worth starting.
    """

    def __init__(
        self,
        module: PlannedModule,
        rows: SourceRows,
        tokens: Tensor,
        measured_as: TensorInfo,
        candidates: Tensor,
        importances: Sequence[Tensor | None],
        device: Device,
        block_bytes: int,
        *,
        compiled: bool,
    ) -> None:
        assert not isinstance(module.weight, PlainWeight)
        self._module = module
        self._weight: AnyScaledWeight = module.weight
        self._rows = rows
        self._device = device
        self._block_bytes = block_bytes
        self._tokens = tokens.to(device.name)
        self._measured_as = measured_as
        self._candidates = candidates.to(device.name)
        self._importances = [None if one is None else one.to(device.name) for one in importances]
        self._transform: BlockTransform = block_transform(
            PlainWeight(format="float32"),
            module.weight,
            rotation=module.rotation,
            prefer_compiled=compiled,
        )

    def sums(self, check: Callable[[], None]) -> list[float]:
        """The error of each candidate: exactly rounded sums, whatever the blocks.

        Args:
            check: called now and then; raises if the work is to end.

        Raises:
            InvalidInput: a number of the weight, or of a token divided by a factor, is not finite.
        """
        given = self._given(check)
        tokens = _Whole.of(self._tokens)
        errors: list[list[float]] = [[] for _ in self._candidates]
        for start, block in self._blocks():
            check()
            exact = _Whole.of(block).times(tokens)
            for place, factors in enumerate(self._candidates):
                with naming(self._module.source.tensors["weight"], start):
                    scales: tuple[Tensor | None, Tensor | None] = (None, None)
                    if given is not None:
                        scales = given[place].rows(start, start + len(block))
                    source = SourceBlock(block, factors=factors)
                    stored = self._stored(source, scales, self._importances[place])
                with naming(self._measured_as):
                    inputs = prepared(self._tokens, factors, self._module.rotation_size)
                    inputs = as_quantized(inputs, self._module.activation)
                found = _Whole.of(stored).times(_Whole.of(inputs))
                errors[place] += sums_of_squares((exact - found).float()).tolist()
        return [math.fsum(each) for each in errors]

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks of the weight in float32, on the device, each with its first row."""
        module = self._module
        multiple = rows_together(module)
        rows = module.source.out_features
        for start, stop in row_blocks(0, rows, self._rows.columns, multiple, self._block_bytes):
            yield start, self._device.take("rows", self._rows.read(start, stop))

    def _given(self, check: Callable[[], None]) -> Sequence[GivenScales] | None:
        """For each candidate the scales of the whole weight, where they are chosen together."""
        if not self._weight.scales_together:
            return None
        maxima: list[list[Tensor]] = [[] for _ in self._candidates]
        for start, block in self._blocks():
            check()
            for found, factors in zip(maxima, self._candidates, strict=True):
                with naming(self._module.source.tensors["weight"], start):
                    found.append(self._transform.absmax(SourceBlock(block, factors=factors)))
        with naming(self._module.source.tensors["weight"]):
            return [GivenScales.of(each, self._weight) for each in maxima]

    def _stored(
        self,
        source: SourceBlock,
        scales: tuple[Tensor | None, Tensor | None],
        importance: Tensor | None,
    ) -> Tensor:
        """A block as its codes and scales mean it, float32 ``[rows, in]``."""
        rows, columns = source.codes.shape
        target = target_block(self._device.memory, self._weight, (rows, columns), *scales)
        self._transform(source, target, importance)
        return get_format(self._weight).decode(
            target.codes, target.scales, self._weight, zero_point=target.zeros
        )


class _Whole:
    """Rows of numbers as whole numbers times a power of two for each row.

    Attributes:
        numbers: float64 ``[rows, columns]``, whole.
        units: float64 ``[rows]``, powers of two.
    """

    def __init__(self, numbers: Tensor, units: Tensor) -> None:
        self.numbers = numbers
        self.units = units

    @classmethod
    def of(cls, block: Tensor) -> _Whole:
        """Rounded to nearest, so that float64 holds the sum of any two rows' products."""
        columns = block.shape[1]
        bits = (_FLOAT64_BITS - math.ceil(math.log2(columns))) // 2
        _, exponents = np.frexp(block.abs().amax(1).cpu().numpy())
        powers = exponents.astype(np.int64) - bits
        units = torch.from_numpy(np.ldexp(1.0, powers)).to(block.device)
        inverse = torch.from_numpy(np.ldexp(1.0, -powers)).to(block.device)
        return cls(block.double().mul_(inverse[:, None]).round_(), units)

    def times(self, other: _Whole) -> Tensor:
        """The product of each row with each row of another, float64, exact."""
        product = self.numbers @ other.numbers.T
        return product.mul_(self.units[:, None]).mul_(other.units)
