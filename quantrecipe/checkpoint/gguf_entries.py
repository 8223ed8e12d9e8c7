"""What a GGUF header says about its tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from quantrecipe.checkpoint.entries import Entry
from quantrecipe.checkpoint.gguf_scan import Cursor
from quantrecipe.checkpoint.scan import ScanError
from quantrecipe.schema.gguf import GGML_TYPES, TYPE_OF
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import Problem

DAMAGED: Final = "It is damaged, incomplete, or not a GGUF file: fetch it again."
ENOUGH: Final = 1000
"""Problems after which no more are looked for: a hostile file would have a million."""

_MOST_DIMENSIONS: Final = 8
_LONGEST_NAME: Final = 65_535
_LARGEST: Final = 2**63 - 1


def read_entries(
    cursor: Cursor, count: int, path: Location, problems: list[Problem]
) -> list[Entry]:
    """The descriptions of ``count`` tensors; what is wrong with one goes to ``problems``.

    Raises:
        ScanError: the header breaks off, so that nothing behind it can be read.
    """
    entries: list[Entry] = []
    names: set[str] = set()
    for _ in range(count):
        start = cursor.position
        name = cursor.string("a tensor's name", _LONGEST_NAME)
        dims = _dimensions(cursor, name)
        number = cursor.unsigned(4, f"the type of {name!r}")
        offset = cursor.unsigned(8, f"the offset of {name!r}")
        fault = _fault(number, dims, offset)
        if not name:
            fault = Problem("bad-name", "a tensor has no name")
        elif name in names:
            fault = Problem(
                "duplicate-key", "the header names it twice, and readers differ in which they take"
            )
        names.add(name)
        if fault is not None:
            message = f"{fault.message} (byte {start:,} of the file describes it)"
            problems.append(replace(fault, message=message, file=str(path), tensor=name))
            if len(problems) >= ENOUGH:
                break
            continue
        kind = GGML_TYPES[number]
        assert kind.dtype is not None
        shape = tuple(reversed(dims))
        end = offset + math.prod(dims) // kind.numbers * kind.nbytes
        entries.append(Entry(name, kind.dtype, shape, offset, end))
    return entries


def _dimensions(cursor: Cursor, name: str) -> list[int]:
    start = cursor.position
    count = cursor.unsigned(4, f"the number of dimensions of {name!r}")
    if count > _MOST_DIMENSIONS:
        raise ScanError(
            "bad-shape",
            f"{name!r} has {count:,} dimensions; up to {_MOST_DIMENSIONS} are read",
            start,
        )
    return [cursor.unsigned(8, f"the dimensions of {name!r}") for _ in range(count)]


def _fault(number: int, dims: Sequence[int], offset: int) -> Problem | None:
    kind = GGML_TYPES.get(number)
    if kind is None:
        return Problem("unknown-dtype", f"{number} is no type of ggml, or one that was given up")
    if kind.dtype is None:
        return Problem(
            "unsupported-dtype",
            f"is stored as {kind.name}, {kind.nbytes} bytes for {kind.numbers} numbers, which is "
            "not read",
            f"Types that are read: {', '.join(each.name for each in TYPE_OF.values())}.",
        )
    shape = list(reversed(dims))
    # Zeros are left out so that a reader that multiplies from left to right overflows no sooner.
    total = kind.nbytes
    for dim in dims:
        total *= dim or 1
        if total > _LARGEST:
            return Problem("bad-shape", f"the shape {shape} is too large for any file")
    if kind.numbers > 1 and (not dims or dims[0] % kind.numbers):
        return Problem(
            "bad-shape",
            f"the shape {shape} is no whole number of {kind.name} records, of {kind.numbers} "
            "numbers each",
        )
    if offset > _LARGEST:
        return Problem("bad-offsets", f"the offset {offset:,} is too large for any file")
    return None
