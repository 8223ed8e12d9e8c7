"""From tensors as they are stored to codes and scales as formats know them, and back.

Whoever reads a module, a block of rows at a time or whole, finds codes unpacked, scales in the rows
of their grid, and scales of two levels multiplied out. Nothing else looks at how they were stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from quantrecipe.formats import get_format, to_float32
from quantrecipe.formats.arrangement import swizzle, unswizzle
from quantrecipe.formats.blocks import SourceBlock
from quantrecipe.formats.constants import CONSTANTS, contradicts
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.packing import pack, pack_down, unpack, unpack_down
from quantrecipe.formats.refusals import NonFinite, first_index
from quantrecipe.formats.rotation import rotate_
from quantrecipe.formats.two_level import TwoLevelScales, effective_scales
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.schemes import AnyWeight, PlainWeight, ScaledWeight
from quantrecipe.schema.storage import TILE_COLUMNS, TILE_ROWS, Storage, padded
from quantrecipe.schema.stored_weights import NESTED_BLOCK
from quantrecipe.schema.tensors import TensorInfo

Read = Callable[[TensorInfo, int, Tensor], None]
"""Fills a contiguous tensor with the bytes of a stored one, from a byte of it on."""


class Memory(Protocol):
    """Hands out memory by purpose; what it gave is valid until the same purpose is asked for."""

    def view(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""


class Fresh:
    """Memory of its own for every tensor."""

    def view(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; it stays valid."""
        return torch.empty(shape, dtype=dtype)


class StoredRows:
    """Rows of one module's weight: codes, scales and zero points, in the order of memory.

    Attributes:
        module: which.
        undone: whether the weight is rotated or smoothed, and means something only together with
            what happens to activations.
        format: what ``given`` has its rows in: float32 where that is undone.

    Args:
        module: which.
        read: where its bytes come from.
        memory: where they go.
    """

    def __init__(self, module: StoredModule, read: Read, memory: Memory) -> None:
        self.module = module
        self.undone = module.rotation is not None or "smoothing" in module.tensors
        self.format: AnyWeight = PlainWeight(format="float32") if self.undone else module.weight
        self._read = read
        self._memory = memory
        self._effective: Tensor | None = None
        self._factors: Tensor | None = None
        self._checked = False

    def check_constants(self) -> None:
        """Look at the tensors beside it that have to say the same of every module.

        Raises:
            InvalidInput: one says otherwise: codes or scales stand for other numbers.
        """
        if self._checked:
            return
        for role in sorted(CONSTANTS & self.module.tensors.keys()):
            info = self.module.tensors[role]
            stored = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
            self._read(info, 0, stored)
            said = contradicts(role, stored)
            if said is not None:
                raise InvalidInput(
                    Problem(
                        "wrong-constant",
                        said,
                        hint="Such weights are not read; write the checkpoint again without them.",
                        file=str(info.file),
                        tensor=info.name,
                    )
                )
        self._checked = True

    def codes(self, start: int, stop: int) -> Tensor:
        """Rows of numbers, or of codes, unpacked: ``[rows, code columns]``.

        Raises:
            InvalidInput: as ``check_constants``.
        """
        self.check_constants()
        module, weight = self.module, self.module.weight
        packing = module.stored("weight").packing
        rows, columns = stop - start, code_columns(weight, module.in_features)
        width = columns if packing is None else packing.stored(columns)
        dtype = code_dtype(weight) if packing is None else TORCH_DTYPES[packing.dtype]
        out = self._memory.view("codes in", (rows, width), dtype)
        self._read(module.tensors["weight"], start * width * dtype.itemsize, out)
        if packing is None:
            return out
        codes = self._memory.view("unpacked", (rows, columns), torch.uint8)
        return unpack(out, packing, columns, out=codes)

    def scales(self, start: int, stop: int) -> Tensor:
        """The scales that these rows are decoded with: the rows of the grid that are theirs.

        Raises:
            ValueError: ``start`` is inside rows whose scales lie together.
        """
        weight, whole = self.module.weight, (self.module.out_features, self.module.in_features)
        if isinstance(weight, PlainWeight):
            raise ValueError(f"{self.module.name!r} is stored as {weight.format}, without scales")
        if weight.has_two_levels:
            if self._effective is None:
                self._effective = effective_scales(self.two_levels(), weight)
            return self._effective[start:stop]
        height = weight.group_shape(*whole)[0]
        grid_rows, columns = weight.scale_grid(*whole)
        if not weight.has_scales:
            return torch.empty((stop - start, 0), dtype=TORCH_DTYPES[weight.grid_dtype])
        if start % height and weight.granularity != "tensor":
            raise ValueError(f"rows from {start} on do not begin a block of {height}")
        first, last = start // height, min(grid_rows, -(-stop // height))
        dtype = TORCH_DTYPES[weight.scale_dtype]
        return self._grid("weight_scale", first, last, columns, dtype, "scales in")

    def zeros(self, start: int, stop: int) -> Tensor | None:
        """The zero points of these rows, uint8 as the grid of their scales, if they have any.

        Raises:
            ValueError: ``start`` is inside rows whose zero points are packed together.
        """
        weight, module = self.module.weight, self.module
        info = module.tensors.get("weight_zero_point")
        if info is None or isinstance(weight, PlainWeight):
            return None
        columns = weight.scale_grid(module.out_features, module.in_features)[1]
        packing = module.stored("weight_zero_point").packing
        if packing is None:
            return self._grid("weight_zero_point", start, stop, columns, torch.uint8, "zeros in")
        if start % packing.codes:
            raise ValueError(f"rows from {start} on do not begin {packing.codes} packed ones")
        dtype = TORCH_DTYPES[packing.dtype]
        rows = packing.stored(stop - start)
        out = self._memory.view("zeros in", (rows, columns), dtype)
        self._read(info, start // packing.codes * columns * dtype.itemsize, out)
        return unpack_down(out, packing, stop - start)

    def given(self, start: int, stop: int, factors: Tensor | None = None) -> SourceBlock:
        """Rows in ``format``, and what their columns are to be multiplied by.

        Raises:
            Unrepresentable: a number that had to be decoded is not finite.
        """
        if self.undone:
            return SourceBlock(self.decoded(start, stop), factors=factors)
        plain = isinstance(self.module.weight, PlainWeight)
        scales = None if plain else self.scales(start, stop)
        return SourceBlock(self.codes(start, stop), scales, self.zeros(start, stop), factors)

    def decoded(self, start: int, stop: int) -> Tensor:
        """Rows as float32 ``[rows, in]``: rotated back, and divided by the smoothing factors.

        Raises:
            Unrepresentable: a number is not finite, or too large for float32.
        """
        weight, columns = self.module.weight, self.module.in_features
        out = self._memory.view("rows", (stop - start, columns), torch.float32)
        if isinstance(weight, PlainWeight):
            return to_float32(self.codes(start, stop), out=out)
        scales, zeros = self.scales(start, stop), self.zeros(start, stop)
        codes = self.codes(start, stop)
        get_format(weight).decode(codes, scales, weight, out=out, zero_point=zeros)
        if self.module.rotation is not None:
            rotate_(out, self.module.rotation.size)
        factors = self.factors()
        return out if factors is None else out.div_(factors)

    def factors(self) -> Tensor | None:
        """The factors that columns of the stored weight are multiplied by, float32 ``[in]``.

        Raises:
            NonFinite: one is not positive and finite.
        """
        info = self.module.tensors.get("smoothing")
        if info is None or self._factors is not None:
            return self._factors
        factors = torch.empty(self.module.in_features)
        self._read(info, 0, factors)
        index = first_index(~((factors > 0) & torch.isfinite(factors)))
        if index is not None:
            raise NonFinite(f"a smoothing factor of {float(factors[index])}", index)
        self._factors = factors
        return factors

    def two_levels(self) -> TwoLevelScales:
        """The scales of the whole weight as they are stored."""
        module, weight = self.module, self.module.weight
        assert isinstance(weight, ScaledWeight)
        rows, columns = weight.scale_grid(module.out_features, module.in_features)
        nested = weight.format == "nf4"
        dtype = torch.uint8 if nested else TORCH_DTYPES[weight.scale_dtype]
        scale = self._grid("weight_scale", 0, rows, columns, dtype, "scales in").clone()
        count = -(-rows * columns // NESTED_BLOCK) if nested else 1
        second = torch.empty(count)
        self._read(module.tensors["second_scale"], 0, second)
        if module.stored("second_scale").reciprocal:
            second.reciprocal_()
        return TwoLevelScales(scale, second, self.scale_offset())

    def scale_offset(self) -> Tensor | None:
        """What is added to scales that are stored less their mean, float32 ``[1]``."""
        module = self.module
        if "scale_offset" in module.tensors:
            offset = torch.empty(1)
            self._read(module.tensors["scale_offset"], 0, offset)
            return offset
        return None if module.scale_offset is None else torch.tensor([module.scale_offset])

    def _grid(
        self, role: str, first: int, last: int, columns: int, dtype: torch.dtype, purpose: str
    ) -> Tensor:
        """Rows of a grid from ``first`` to ``last``."""
        info, storage = self.module.tensors[role], self.module.stored(role)
        if storage.arrangement == "rows":
            out = self._memory.view(purpose, (last - first, columns), dtype)
            self._read(info, first * columns * dtype.itemsize, out)
            return out
        if first % TILE_ROWS:
            raise ValueError(f"rows from {first} on do not begin a tile of {TILE_ROWS}")
        shape = padded(last - first, TILE_ROWS), padded(columns, TILE_COLUMNS)
        tiles = self._memory.view(purpose, shape, dtype)
        self._read(info, first * shape[1] * dtype.itemsize, tiles)
        return unswizzle(tiles, last - first, columns)


def code_columns(weight: AnyWeight, in_features: int) -> int:
    """How many codes, or plain numbers, a row of so many input features has."""
    return in_features if isinstance(weight, PlainWeight) else weight.code_columns(in_features)


def code_dtype(weight: AnyWeight) -> torch.dtype:
    """The dtype of codes, or of plain numbers, in memory."""
    return TORCH_DTYPES[weight.format if isinstance(weight, PlainWeight) else weight.code_dtype]


def to_stored(tensor: Tensor, role: str, storage: Storage, out: Tensor | None = None) -> Tensor:
    """A block of codes, scales, zero points or a second level of scales as a layout stores it.

    Args:
        tensor: in the order of memory: rows of codes or of a grid.
        role: which of them it is.
        storage: how it lies.
        out: receives packed codes.
    """
    if storage.packing is not None:
        if role == "weight_zero_point":
            return pack_down(tensor, storage.packing)
        return pack(tensor, storage.packing, out)
    if storage.arrangement != "rows":
        return swizzle(tensor)
    return tensor.reciprocal() if storage.reciprocal else tensor
