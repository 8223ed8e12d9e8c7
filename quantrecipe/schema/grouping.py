"""Many numbered names as few patterns: ``layers.{0..33}.attention.qkv``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import product

_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]*)(?![^.])")
"""A dotted segment that is a number."""

Numbers = tuple[int, ...]


def collapse(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Patterns that match exactly the given names, each with the names it stands for.

    Names that differ in numbered segments only share as few patterns as their numbers allow. In
    order of first appearance.
    """
    groups: dict[str, dict[Numbers, str]] = {}
    for name in names:
        numbers = tuple(int(number) for number in _NUMBER.findall(name))
        groups.setdefault(_NUMBER.sub("#", name), {})[numbers] = name
    found = []
    for shape, members in groups.items():
        for axes in _grids(sorted(members)):
            pieces = shape.split("#")
            pattern = pieces[0] + "".join(
                _alternatives(axis) + piece for axis, piece in zip(axes, pieces[1:], strict=True)
            )
            found.append((pattern, [members[numbers] for numbers in product(*axes)]))
    return found


def _grids(numbers: Sequence[Numbers]) -> list[tuple[Numbers, ...]]:
    """Full grids that together are exactly ``numbers``, given sorted and all of one length."""
    if not numbers or not numbers[0]:
        return [()] * len(numbers)
    rest: dict[int, list[Numbers]] = {}
    for first, *others in numbers:
        rest.setdefault(first, []).append(tuple(others))
    same: dict[tuple[Numbers, ...], list[int]] = {}
    for first, others in rest.items():
        for grid in _grids(others):
            same.setdefault(grid, []).append(first)
    return [(tuple(firsts), *grid) for grid, firsts in same.items()]


def _alternatives(values: Sequence[int]) -> str:
    """``7``, ``{0..33}`` or ``{0..2,5,9..11}``."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    if len(values) == 1:
        return str(values[0])
    pieces = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return "{" + ",".join(pieces) + "}"
