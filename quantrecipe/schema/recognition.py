"""Which layout a checkpoint is in: every known one is tried, and the best explanation wins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from quantrecipe.schema.base import PART_NAME
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import PartContents, StoredModule, match_template, read_part
from quantrecipe.schema.layout_writing import holds_many_parts
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.tensors import SourcePart, TensorInfo

_SCALED_FAULTS: Final = frozenset({"missing-scale", "mistyped-scale", "misshaped-scale"})
_MOST_PARTS: Final = 64
_PART_NAME: Final = re.compile(PART_NAME)


@dataclass(frozen=True, slots=True)
class Reading:
    """Files, read through one layout.

    Attributes:
        layout: the layout.
        parts: the parts that it finds in them, all of the same files.
        contents: what each part holds.
        unclaimed: tensors that no part accounts for.
    """

    layout: Layout
    parts: tuple[SourcePart, ...]
    contents: Mapping[str, PartContents]
    unclaimed: tuple[TensorInfo, ...]

    def modules(self) -> Iterator[StoredModule]:
        """The modules of every part."""
        for contents in self.contents.values():
            yield from contents.modules.values()

    @property
    def quantized(self) -> int:
        """How many modules are stored as codes and scales."""
        return sum(isinstance(module.weight, ScaledWeight) for module in self.modules())

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What the layout does not explain."""
        found = [problem for contents in self.contents.values() for problem in contents.problems]
        found += [
            Problem(
                "unowned-tensor",
                f"layout {self.layout.name!r} has no place for it in "
                f"{' or '.join(repr(name) for name in self.contents)}",
                file=str(info.file),
                tensor=info.name,
            )
            for info in self.unclaimed
        ]
        if len(self.parts) > 1 and not holds_many_parts(self.layout):
            found.append(
                Problem(
                    "parts-share-file",
                    f"layout {self.layout.name!r} does not say in a tensor's name which part it "
                    f"belongs to, so {', '.join(self.contents)} cannot lie in the same files",
                    hint="Name one part for these files.",
                )
            )
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What files were found to be.

    Attributes:
        best: the reading that explains them best.
        fits: whether it explains everything.
        rivals: other layouts that explain them just as well.
    """

    best: Reading
    fits: bool
    rivals: tuple[str, ...]


def recognise(
    parts: Sequence[SourcePart], layouts: Iterable[Layout], *, named: bool = False
) -> Verdict:
    """Read files through every layout and choose.

    In this order: the fewest problems and unaccounted tensors; the most modules recognised as
    quantized; the fewest tensors that are only carried along; names without a part in them; the
    layout that holds the fewest formats; its name. A checkpoint where
    nothing is quantized is therefore in the plainest layout there is; one with parts in its names
    comes last for it.

    Args:
        parts: over the same files; several of them only if the caller knows their names.
        layouts: at least one.
        named: whether the parts' names are given; otherwise a layout that writes part names into
            tensor names finds them there.

    Raises:
        ValueError: no layout was given.
    """
    readings = [read_all(layout, parts, named=named) for layout in layouts]
    if not readings:
        raise ValueError("no layout to try")
    tried = sorted(((_rank(reading), reading) for reading in readings), key=lambda pair: pair[0])
    (rank, best), *others = tried
    rivals = tuple(
        reading.layout.name
        for other, reading in others
        if other[:-1] == rank[:-1] and best.quantized
    )
    return Verdict(best, not best.problems, rivals)


def recognise_together(
    pieces: Sequence[Sequence[SourcePart]], layouts: Iterable[Layout], *, named: bool = False
) -> tuple[Reading, ...]:
    """Read several sets of files through the one layout that explains them best together.

    Raises:
        ValueError: no layout was given.
    """
    tried = []
    for layout in layouts:
        readings = tuple(read_all(layout, parts, named=named) for parts in pieces)
        ranks = [_rank(reading)[:-1] for reading in readings]
        unread = sum(bool(reading.problems) for reading in readings)
        tried.append(((unread, *map(sum, zip(*ranks, strict=True)), layout.name), readings))
    if not tried:
        raise ValueError("no layout to try")
    return min(tried, key=lambda pair: pair[0])[1]


def read_all(layout: Layout, parts: Sequence[SourcePart], *, named: bool = False) -> Reading:
    """Read files through one layout; the arguments are those of ``recognise``."""
    if not named and "{part}" in layout.others.name:
        names = part_names(layout, parts[0].tensors)
        parts = [replace(parts[0], name=name) for name in names] or parts
    contents = {part.name: read_part(layout, part) for part in parts}
    claimed = frozenset[str]().union(*(found.claimed for found in contents.values()))
    unclaimed = [info for name, info in parts[0].tensors.items() if name not in claimed]
    return Reading(layout, tuple(parts), contents, tuple(unclaimed))


def part_names(layout: Layout, tensors: Iterable[str]) -> list[str]:
    """The parts that tensor names speak of in a layout with ``{part}`` in its names.

    None where they speak of more than any model has: then it is no part that they begin with.
    """
    before, _, rest = layout.others.name.partition("{part}")
    between = rest.partition("{tensor}")[0]
    found: set[str] = set()
    for tensor in tensors:
        if tensor in layout.markers or not tensor.startswith(before):
            continue
        name = tensor[len(before) :].partition(between)[0] if between else ""
        if (
            _PART_NAME.match(name) is not None
            and match_template(layout.others.name, tensor, name, "tensor") is not None
        ):
            found.add(name)
    return sorted(found) if len(found) <= _MOST_PARTS else []


def _rank(reading: Reading) -> tuple[bool, int, int, int, bool, int, str]:
    problems = reading.problems
    recognised = reading.quantized + sum(problem.kind in _SCALED_FAULTS for problem in problems)
    others = sum(len(contents.others) for contents in reading.contents.values())
    in_names = "{part}" in reading.layout.others.name
    return (
        # Any dotted name begins with what could be a part; with nothing quantized behind it, taking
        # it for one would only hide what is wrong with the module of that name.
        in_names and not recognised,
        len(problems),
        -recognised,
        others,
        in_names,
        len(reading.layout.holds),
        reading.layout.name,
    )
