"""Cutting a plan into units: what is converted at once, written at once, and done again at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from quantrecipe import formats
from quantrecipe.schema.lock import Role
from quantrecipe.schema.plan import Plan, PlannedModule, PlannedOther, PlannedTensor
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.storage import padded
from quantrecipe.schema.tensors import TensorInfo

_IN_ROWS: Final = frozenset({"weight", "weight_scale", "weight_zero_point"})
"""Roles of which rows of a weight have bytes of their own."""

UNIT_BYTES: Final = 64 << 20
"""About how many bytes of source a unit has at most.

It is no option: sums of errors are added up unit by unit, and the lock shows them.
"""


@dataclass(frozen=True, slots=True)
class Range:
    """Consecutive bytes of an output file that one unit writes.

    Attributes:
        file: below the output folder.
        tensor: the tensor that they belong to.
        position: of the first byte, from the start of the file.
        nbytes: how many they are.
        whole: whether they are all of the tensor.
    """

    file: str
    tensor: str
    position: int
    nbytes: int
    whole: bool


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows of one module, or bytes of one tensor that belongs to none.

    A unit stands by itself: whoever has it, the source and the output's files can convert it, in
    any process, any number of times, to the same bytes.

    Attributes:
        index: its place among the units of the plan.
        of: the module or tensor.
        start, stop: rows of the module's weight, or bytes of the tensor.
    """

    index: int
    of: PlannedModule | PlannedOther
    start: int
    stop: int

    @property
    def first(self) -> bool:
        """Whether it is the first of its module or tensor: what cannot be cut is written there."""
        return self.start == 0

    @property
    def rows(self) -> int:
        """Rows of the whole module, or of the whole tensor; a tensor without dimensions has one."""
        if isinstance(self.of, PlannedOther):
            return self.of.source.shape[0] if self.of.source.shape else 1
        return self.of.source.out_features

    def ranges(self) -> Mapping[Role, Range]:
        """What it writes, by role; all units together write every byte of every tensor once."""
        if isinstance(self.of, PlannedOther):
            wide = self.of.output.nbytes / max(1, self.of.source.nbytes)
            return {"other": _range(self.of.output, int(self.start * wide), int(self.stop * wide))}
        found = {}
        for role, output in self.of.outputs.items():
            start, stop = self._bytes(role, output, self.of)
            if self.first or stop > start:
                found[role] = _range(output, start, stop)
        return found

    @property
    def source_bytes(self) -> int:
        """Bytes of source that are done with when it is."""
        if isinstance(self.of, PlannedOther):
            return self.stop - self.start
        size, rows = self.of.source.nbytes, self.of.source.out_features
        return size * self.stop // rows - size * self.start // rows

    @property
    def main_source(self) -> tuple[TensorInfo, int, int]:
        """The tensor that most of its source is, the first byte of it, and how many there are."""
        if isinstance(self.of, PlannedOther):
            return self.of.source, self.start, self.stop - self.start
        weight = self.of.source.tensors["weight"]
        row = weight.nbytes // self.of.source.out_features
        return weight, self.start * row, (self.stop - self.start) * row

    def sources(self) -> Iterator[tuple[TensorInfo, int, int]]:
        """What is read for it: tensors, each with the first byte and how many there are.

        What is not cut with the rows of a weight belongs to the first unit of the module.
        """
        yield self.main_source
        if self.first and isinstance(self.of, PlannedModule):
            yield from _beside_weight(self.of)

    def _bytes(self, role: Role, output: PlannedTensor, module: PlannedModule) -> tuple[int, int]:
        rows, columns = module.source.out_features, module.source.in_features
        whole = self.start == 0 and self.stop == rows
        if role not in _IN_ROWS or whole:
            return (0, output.nbytes) if self.first else (0, 0)
        if role == "weight":
            row = output.nbytes // rows
            return self.start * row, self.stop * row
        assert isinstance(module.weight, ScaledWeight)
        height, _ = module.weight.group_shape(rows, columns)
        storage = module.stored(role)
        if storage.packing is not None:
            height = storage.packing.codes
            row = output.nbytes // storage.packing.stored(rows)
            return self.start // height * row, storage.packing.stored(self.stop) * row
        grid_rows = module.weight.scale_grid(rows, columns)[0]
        if storage.arrangement != "rows":
            tile = storage.rows_together
            row = output.nbytes // padded(grid_rows, tile)
            return self.start * row, padded(self.stop, tile) * row
        row = output.nbytes // grid_rows
        return self.start // height * row, -(-self.stop // height) * row


def cut(plan: Plan, unit_bytes: int = UNIT_BYTES) -> tuple[Unit, ...]:
    """Every unit of a plan, in the order of the source: modules and tensors as their files go on.

    A module that needs all of its weight at once (a scale for the whole tensor) is one unit.
    """
    pieces: list[tuple[PlannedModule | PlannedOther, int, int]] = []
    for module in plan.modules:
        rows = module.source.out_features
        step = rows
        if _can_be_cut(module):
            row = max(1, module.source.tensors["weight"].nbytes // rows)
            multiple = rows_together(module)
            step = max(1, unit_bytes // (row * multiple)) * multiple
        pieces += [(module, start, min(rows, start + step)) for start in range(0, rows, step)]
    for other in plan.others:
        size = other.source.nbytes
        starts = range(0, size, unit_bytes) if size else range(1)
        pieces += [(other, start, min(size, start + unit_bytes)) for start in starts]
    files = {file.path: place for place, file in enumerate(plan.source_files)}

    def where(piece: tuple[PlannedModule | PlannedOther, int, int]) -> tuple[int, int, int]:
        of, start, _ = piece
        info = of.source if isinstance(of, PlannedOther) else of.source.tensors["weight"]
        return files[info.file], info.offset, start

    return tuple(Unit(index, *piece) for index, piece in enumerate(sorted(pieces, key=where)))


def sources_of(module: PlannedModule) -> Iterator[tuple[TensorInfo, int, int]]:
    """What is read for all of a module; as ``Unit.sources``."""
    weight = module.source.tensors["weight"]
    yield weight, 0, weight.nbytes
    yield from _beside_weight(module)


def _beside_weight(module: PlannedModule) -> Iterator[tuple[TensorInfo, int, int]]:
    for role, tensor in module.source.tensors.items():
        # The content of small ones was read along with the header.
        if role != "weight" and tensor.content is None:
            yield tensor, 0, tensor.nbytes


def rows_together(module: PlannedModule) -> int:
    """Rows that must stay together to be read, decoded, encoded and written."""
    return math.lcm(
        *(formats.rows_together(each.weight, each.storage) for each in (module.source, module))
    )


def row_blocks(
    start: int, stop: int, columns: int, multiple: int, block_bytes: int
) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks of about ``block_bytes`` of float32, at multiples of ``multiple``.

    Blocks are counted from ``start``, itself a multiple.
    """
    step = max(1, block_bytes // max(1, 4 * columns * multiple)) * multiple
    for first in range(start, stop, step):
        yield first, min(stop, first + step)


def _can_be_cut(module: PlannedModule) -> bool:
    weights = [module.source.weight, module.weight]
    whole = any(isinstance(one, ScaledWeight) and one.scales_together for one in weights)
    return not whole


def _range(output: PlannedTensor, start: int, stop: int) -> Range:
    whole = start == 0 and stop == output.nbytes
    return Range(output.file, output.name, output.offset + start, stop - start, whole)
