"""Reading a module's weight as float32 rows, a block at a time, whatever format it is stored in."""

from __future__ import annotations

import torch
from torch import Tensor

from quantrecipe.checkpoint import SourceReader
from quantrecipe.converter.buffers import Buffers
from quantrecipe.converter.devices import Device
from quantrecipe.converter.refusals import check_scales, naming
from quantrecipe.formats import get_format, to_float32
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.memory import as_memory
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.schemes import PlainWeight, ScaledWeight
from quantrecipe.schema.tensors import TensorInfo


def read_slice(
    reader: SourceReader, info: TensorInfo, first: int, shape: tuple[int, ...], out: Tensor
) -> Tensor:
    """Fill ``out`` with ``shape`` elements of a tensor, from element ``first`` on."""
    reader.read_into(info, first * out.dtype.itemsize, as_memory(out))
    return out.view(shape)


class SourceRows:
    """One module's weight, decoded to float32 by rows."""

    def __init__(self, module: StoredModule, reader: SourceReader, buffers: Buffers) -> None:
        self.module = module
        self._reader = reader
        self._buffers = buffers

    @property
    def columns(self) -> int:
        """The input features."""
        return self.module.in_features

    def codes(self, start: int, stop: int) -> Tensor:
        """Rows as they are stored, ``[rows, in]``; valid until the next call."""
        shape = stop - start, self.module.in_features
        out = self._buffers.view("codes in", shape, TORCH_DTYPES[self.module.weight.format])
        first = start * self.module.in_features
        return read_slice(self._reader, self.module.tensors["weight"], first, shape, out)

    def scales(self, start: int, stop: int) -> Tensor:
        """The scales of these rows, as a grid; valid until the next call.

        Raises:
            InvalidInput: one is not finite.
        """
        weight = self.module.weight
        assert isinstance(weight, ScaledWeight)
        grid_rows, grid_columns = weight.scale_grid(
            self.module.out_features, self.module.in_features
        )
        rows, _ = weight.group_shape(self.module.out_features, self.module.in_features)
        first, last = start // rows, min(grid_rows, -(-stop // rows))
        shape = last - first, grid_columns
        out = self._buffers.view("scales in", shape, TORCH_DTYPES[weight.scale_dtype])
        info = self.module.tensors["weight_scale"]
        grid = read_slice(self._reader, info, first * grid_columns, shape, out)
        check_scales(grid, info, first)
        return grid

    def stored(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Rows as they are stored, and their scales if they have any.

        Raises:
            InvalidInput: a scale is not finite.
        """
        plain = isinstance(self.module.weight, PlainWeight)
        return self.codes(start, stop), None if plain else self.scales(start, stop)

    def stored_on(self, device: Device, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """As ``stored``, on a device."""
        codes, scales = self.stored(start, stop)
        moved = None if scales is None else device.take("scales in", scales)
        return device.take("codes in", codes), moved

    def read(self, start: int, stop: int) -> Tensor:
        """Rows as float32, ``[rows, in]``; valid until the next call.

        Raises:
            InvalidInput: a value is not finite, or too large for float32.
        """
        codes = self.codes(start, stop)
        weight = self.module.weight
        info = self.module.tensors["weight"]
        out = self._buffers.view("rows", tuple(codes.shape), torch.float32)
        with naming(info, start):
            if isinstance(weight, PlainWeight):
                return to_float32(codes, out=out)
            return get_format(weight).decode(codes, self.scales(start, stop), weight, out=out)
