"""A module's rows and a tensor's numbers: all that comparing knows of how they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quantrecipe.evaluate.proofs import row_blocks
from quantrecipe.evaluate.unequal import first_unequal_byte
from quantrecipe.formats import get_format, rows_together
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.rotation import rotate_
from quantrecipe.loaders import Checkpoint
from quantrecipe.schema.dtypes import DTYPES, is_plain
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.plan_readback import same_numbers
from quantrecipe.schema.schemes import AnyWeight, PlainWeight, ScaledWeight
from quantrecipe.schema.storage import WRITTEN_ANEW
from quantrecipe.schema.tensors import TensorInfo

BESIDE_WEIGHT: Final = ("bias", "input_scale")
"""Roles of tensors that say nothing of the weight, and mean something by themselves."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of an open checkpoint."""

    checkpoint: Checkpoint
    info: TensorInfo

    def unequal_byte(self, other: StoredTensor, block_bytes: int) -> int | None:
        """The first byte in which two tensors of as many bytes differ."""
        return first_unequal_byte(
            self.checkpoint, self.info, other.checkpoint, other.info, block_bytes
        )

    def has_bytes_of(self, other: StoredTensor, block_bytes: int) -> bool:
        """Whether both hold the same numbers of the same dtype, in whatever shape."""
        alike = (self.info.dtype, self.info.nbytes) == (other.info.dtype, other.info.nbytes)
        return alike and self.unequal_byte(other, block_bytes) is None

    @property
    def plain(self) -> bool:
        """Whether it holds plain numbers."""
        return is_plain(self.info.dtype)

    def numbers(self, start: int, stop: int) -> Tensor:
        """Numbers of a plain tensor in their own dtype, as one row: ``[1, stop - start]``."""
        size = DTYPES[self.info.dtype].bits // 8
        buffer = bytearray((stop - start) * size)
        self.checkpoint.read_into(self.info, start * size, buffer)
        return torch.frombuffer(buffer, dtype=TORCH_DTYPES[self.info.dtype]).view(1, -1)


class RowBlock(NamedTuple):
    """Rows of a weight as they are stored, unpacked.

    Attributes:
        codes: ``[rows, in]``.
        scales: the rows of the canonical grid that belong to them; ``None`` in a plain dtype.
        zero_points: of the same shape; ``None`` where the format has none.
    """

    codes: Tensor
    scales: Tensor | None
    zero_points: Tensor | None


class ModuleRows:
    """One module of an open checkpoint, read a few rows at a time.

    Args:
        checkpoint: the checkpoint.
        part: the part that the module is in.
        module: the module.
    """

    def __init__(self, checkpoint: Checkpoint, part: str, module: StoredModule) -> None:
        self.checkpoint = checkpoint
        self.module = module
        self._rows = checkpoint.stored(module.name, part)
        info = module.tensors.get("smoothing")
        self._factors = None if info is None else checkpoint.tensor(info)

    @property
    def weight(self) -> AnyWeight:
        """How the weight is stored."""
        return self.module.weight

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in features."""
        return self.module.out_features, self.module.in_features

    @property
    def is_itself(self) -> bool:
        """Whether the numbers are stored as they are: in a plain dtype, neither smoothed."""
        return (
            isinstance(self.weight, PlainWeight)
            and self._factors is None
            and self.module.rotation is None
        )

    def tensor(self, role: str) -> StoredTensor | None:
        """The tensor of a role, if the module has one."""
        info = self.module.tensors.get(role)
        return None if info is None else StoredTensor(self.checkpoint, info)

    def of_weight(self) -> dict[str, StoredTensor]:
        """The tensors that its weight consists of, by role."""
        return {
            role: StoredTensor(self.checkpoint, info)
            for role, info in self.module.tensors.items()
            if role not in WRITTEN_ANEW and role not in BESIDE_WEIGHT
        }

    def coded_as(self, other: ModuleRows) -> bool:
        """Whether equal bytes of all tensors of two modules mean equal numbers."""
        mine, theirs = self.module, other.module
        return (
            same_numbers(mine.weight, theirs.weight, self.shape)
            and mine.storage == theirs.storage
            and mine.scale_offset == theirs.scale_offset
            and mine.rotation == theirs.rotation
        )

    def turned_as(self, other: ModuleRows) -> bool:
        """Whether both are smoothed by the same factors and rotated alike."""
        if self.module.rotation != other.module.rotation:
            return False
        if self._factors is None or other._factors is None:
            return self._factors is other._factors
        return torch.equal(self._factors, other._factors)

    def blocks(self, other: ModuleRows, block_bytes: int) -> Iterator[tuple[int, int]]:
        """Runs of rows that both modules can be read by; none of a module without numbers."""
        if self.module.in_features:
            yield from row_blocks(self.module, other.module, block_bytes)

    def stored(self, start: int, stop: int) -> RowBlock:
        """Rows as they are stored; ``start`` is one of ``blocks``."""
        codes = self._rows.codes(start, stop)
        if isinstance(self.weight, PlainWeight):
            return RowBlock(codes, None, None)
        return RowBlock(codes, self._rows.scales(start, stop), self._rows.zeros(start, stop))

    def values(self, start: int, stop: int) -> Tensor:
        """Rows as the numbers that a reader gets: rotated back, divided by smoothing factors.

        A number that is none, as of a damaged scale, comes through.

        Returns:
            float32 ``[rows, in]``; float64 where that is stored.
        """
        codes, scales, zeros = self.stored(start, stop)
        weight = self.weight
        if isinstance(weight, PlainWeight):
            values = as_float(codes)
        else:
            assert scales is not None
            values = get_format(weight).decode(
                codes, scales, weight, zero_point=zeros, checked=False
            )
        if self.module.rotation is not None:
            rotate_(values, self.module.rotation.size)
        return values if self._factors is None else values / self._factors

    def step(self, row: int, column: int) -> float | None:
        """The scale of one number, in units of what a reader gets.

        ``None`` where it has none of its own: none at all, inside a record, or of a rotated number.
        """
        weight = self.weight
        if not isinstance(weight, ScaledWeight) or self.module.rotation is not None:
            return None
        together = rows_together(weight, self.module.storage)
        first = row - row % together
        scales = self.stored(first, row + 1).scales
        if scales is None or not scales.numel():
            return None
        height, width = weight.group_shape(*self.shape)
        step = float(scales[(row - first) // height, column // width])
        return step if self._factors is None else step / float(self._factors[column])

    def spread(self, grid: Tensor, rows: int) -> Tensor:
        """What stands in the grid of a block for each of its numbers: ``[rows, in]``."""
        assert isinstance(self.weight, ScaledWeight)
        height, width = self.weight.group_shape(*self.shape)
        down = torch.arange(rows) // height
        return grid[down.unsqueeze(1), torch.arange(self.module.in_features) // width]


def as_float(numbers: Tensor) -> Tensor:
    """Plain numbers in float32; float64 as it is."""
    return numbers if numbers.dtype == torch.float64 else numbers.float()
