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
from quantrecipe.formats.packing import unpack, unpack_down
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
        """Rows of numbers, or of codes, unpacked: ``[rows, in]``; valid until the next call."""
        module, packing = self.module, self.module.packings.get("weight")
        info = module.tensors["weight"]
        rows, columns = stop - start, module.in_features
        width = columns if packing is None else packing.stored(columns)
        out = self._buffers.view("codes in", (rows, width), TORCH_DTYPES[info.dtype])
        stored = read_slice(self._reader, info, start * width, (rows, width), out)
        if packing is None:
            return stored
        codes = self._buffers.view("unpacked", (rows, columns), torch.uint8)
        return unpack(stored, packing, columns, out=codes)

    def scales(self, start: int, stop: int) -> Tensor:
        """The scales of these rows, as a grid; valid until the next call.

        Raises:
            InvalidInput: one is not finite.
        """
        first, shape = self._grid(start, stop)
        weight = self.module.weight
        assert isinstance(weight, ScaledWeight)
        out = self._buffers.view("scales in", shape, TORCH_DTYPES[weight.scale_dtype])
        info = self.module.tensors["weight_scale"]
        grid = read_slice(self._reader, info, first * shape[1], shape, out)
        check_scales(grid, info, first)
        return grid

    def zeros(self, start: int, stop: int) -> Tensor | None:
        """The zero points of these rows, uint8 of the shape of their scales, if they have any."""
        info = self.module.tensors.get("weight_zero_point")
        if info is None:
            return None
        (first, shape), packing = (
            self._grid(start, stop),
            self.module.packings.get("weight_zero_point"),
        )
        rows, columns = shape
        if packing is not None:
            first, rows = first // packing.codes, packing.stored(rows)
        out = self._buffers.view("zeros in", (rows, columns), TORCH_DTYPES[info.dtype])
        stored = read_slice(self._reader, info, first * columns, (rows, columns), out)
        return stored if packing is None else unpack_down(stored, packing, shape[0])

    def stored(self, start: int, stop: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows as they are stored, their scales and their zero points, where there are any.

        Raises:
            InvalidInput: a scale is not finite.
        """
        plain = isinstance(self.module.weight, PlainWeight)
        scales = None if plain else self.scales(start, stop)
        return self.codes(start, stop), scales, self.zeros(start, stop)

    def stored_on(
        self, device: Device, start: int, stop: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As ``stored``, on a device."""
        codes, scales, zeros = self.stored(start, stop)
        return (
            device.take("codes in", codes),
            None if scales is None else device.take("scales in", scales),
            None if zeros is None else device.take("zeros in", zeros),
        )

    def read(self, start: int, stop: int) -> Tensor:
        """Rows as float32, ``[rows, in]``; valid until the next call.

        Raises:
            InvalidInput: a value is not finite, or too large for float32.
        """
        codes, scales, zeros = self.stored(start, stop)
        weight = self.module.weight
        info = self.module.tensors["weight"]
        out = self._buffers.view("rows", tuple(codes.shape), torch.float32)
        with naming(info, start):
            if isinstance(weight, PlainWeight):
                return to_float32(codes, out=out)
            assert scales is not None
            return get_format(weight).decode(codes, scales, weight, out=out, zero_point=zeros)

    def _grid(self, start: int, stop: int) -> tuple[int, tuple[int, int]]:
        """The first row of the grid of scales that these rows need, and the shape of all."""
        weight, whole = self.module.weight, (self.module.out_features, self.module.in_features)
        assert isinstance(weight, ScaledWeight)
        grid_rows, grid_columns = weight.scale_grid(*whole)
        rows, _ = weight.group_shape(*whole)
        first, last = start // rows, min(grid_rows, -(-stop // rows))
        return first, (last - first, grid_columns)
