"""Reading a module's weight as float32 rows, a block at a time, whatever format it is stored in."""

from __future__ import annotations

from torch import Tensor

from quantrecipe.checkpoint import SourceReader
from quantrecipe.converter.buffers import Buffers
from quantrecipe.converter.devices import Device
from quantrecipe.converter.refusals import check_scales, naming
from quantrecipe.formats.blocks import SourceBlock
from quantrecipe.formats.memory import as_memory
from quantrecipe.formats.stored import StoredRows
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.schemes import PlainWeight
from quantrecipe.schema.tensors import TensorInfo


def read_slice(
    reader: SourceReader, info: TensorInfo, first: int, shape: tuple[int, ...], out: Tensor
) -> Tensor:
    """Fill ``out`` with ``shape`` elements of a tensor, from element ``first`` on."""
    reader.read_into(info, first * out.dtype.itemsize, as_memory(out))
    return out.view(shape)


class SourceRows:
    """One module's weight by rows: as it is stored, or decoded to float32.

    Attributes:
        module: which.
        as_stored: its rows without a look at their numbers.
        format: what ``stored`` gives its rows in; see ``StoredRows``.
    """

    def __init__(self, module: StoredModule, reader: SourceReader, buffers: Buffers) -> None:
        def read(info: TensorInfo, start: int, out: Tensor) -> None:
            reader.read_into(info, start, as_memory(out))

        self.module = module
        self.as_stored = StoredRows(module, read, buffers)
        self.format = self.as_stored.format

    @property
    def columns(self) -> int:
        """The input features."""
        return self.module.in_features

    def codes(self, start: int, stop: int) -> Tensor:
        """Rows of numbers, or of codes, unpacked; valid until the next call."""
        return self.as_stored.codes(start, stop)

    def scales(self, start: int, stop: int) -> Tensor:
        """The scales of these rows, as a grid; valid until the next call.

        Raises:
            InvalidInput: one is not finite.
        """
        grid = self.as_stored.scales(start, stop)
        self._check(grid, start)
        return grid

    def stored(self, start: int, stop: int, factors: Tensor | None = None) -> SourceBlock:
        """Rows in ``format``, and what their columns are to be multiplied by.

        Raises:
            InvalidInput: a scale is not finite, or a number that is decoded is not.
        """
        with naming(self.module.tensors["weight"], start):
            block = self.as_stored.given(start, stop, factors)
        if block.scales is not None:
            self._check(block.scales, start)
        return block

    def stored_on(
        self, device: Device, start: int, stop: int, factors: Tensor | None = None
    ) -> SourceBlock:
        """As ``stored``, on a device, where the factors are already."""
        block = self.stored(start, stop)
        return SourceBlock(
            device.take("codes in", block.codes),
            None if block.scales is None else device.take("scales in", block.scales),
            None if block.zeros is None else device.take("zeros in", block.zeros),
            factors,
        )

    def read(self, start: int, stop: int) -> Tensor:
        """Rows as float32, ``[rows, in]``; valid until the next call.

        Raises:
            InvalidInput: a value is not finite, or too large for float32.
        """
        module = self.module
        if not isinstance(module.weight, PlainWeight):
            self.scales(start, stop)
        if "smoothing" in module.tensors:
            with naming(module.tensors["smoothing"]):
                self.as_stored.factors()
        with naming(module.tensors["weight"], start):
            return self.as_stored.decoded(start, stop)

    def _check(self, grid: Tensor, start: int) -> None:
        module, weight = self.module, self.module.weight
        if not isinstance(weight, PlainWeight) and weight.has_scales:
            height = weight.group_shape(module.out_features, module.in_features)[0]
            check_scales(grid, module.tensors["weight_scale"], start // height)
