"""How tensors of a module lie on disk where they are not as they are in memory.

A format has codes, one for each number of a weight, and a grid of scales. A layout stores them as
they are, or otherwise: codes packed into wider numbers, scales in tiles, a scale as the number that
it divides by. What is said here changes no number; nothing else knows bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

PackingName = Literal["int32-low-nibble", "uint8-high-nibble", "uint8-low-nibble"]
Arrangement = Literal["rows", "tiles-128x4"]

TILE_ROWS: Final = 128
TILE_COLUMNS: Final = 4


@dataclass(frozen=True, slots=True)
class Packing:
    """How codes of 4 bits are put into wider numbers.

    Attributes:
        name: what layouts call it.
        dtype: of the numbers that are stored.
        codes: how many codes one of them holds.
        low_first: whether the first code is in the lowest bits, and not in the highest.
    """

    name: PackingName
    dtype: Literal["int32", "uint8"]
    codes: int
    low_first: bool

    def stored(self, codes: int) -> int:
        """How many stored numbers hold this many codes; the last may have bits to spare."""
        return -(-codes // self.codes)


PACKINGS: Final[Mapping[PackingName, Packing]] = MappingProxyType(
    {
        packing.name: packing
        for packing in (
            Packing("int32-low-nibble", "int32", 8, low_first=True),
            Packing("uint8-high-nibble", "uint8", 2, low_first=False),
            Packing("uint8-low-nibble", "uint8", 2, low_first=True),
        )
    }
)
"""Every packing, by name."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How one tensor of a module lies on disk.

    Attributes:
        packing: how its codes share stored numbers: along a row, or for zero points from row to
            row.
        arrangement: in which order the numbers of a grid of scales lie.
        reciprocal: whether what is stored is 1 by what is meant.
    """

    packing: Packing | None = None
    arrangement: Arrangement = "rows"
    reciprocal: bool = False

    @property
    def rows_together(self) -> int:
        """Rows of a grid whose stored numbers lie together."""
        if self.arrangement == "tiles-128x4":
            return TILE_ROWS
        return 1


WRITTEN_ANEW: Final = frozenset({"weight_shape", "marker", "code_map", "scale_map", "zeros"})
"""Roles of tensors that follow from how a module is stored, and are never copied, cut or joined."""

AS_IT_IS: Final = Storage()
"""Stored as it is in memory."""


def padded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple
