"""Packings: how several codes share one stored number. A layout names one; nothing else knows bits.

A format has codes, one for each number of a weight. What a layout stores is those codes as they
are, or packed: the packing says in which dtype, how many, and in which order, and so the stored
shape follows from the shape of the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

PackingName = Literal["int32-low-nibble", "uint8-high-nibble"]


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
        )
    }
)
"""Every packing, by name."""
