"""Which layout a checkpoint is in: every known one is tried, and the best explanation wins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from quantrecipe.schema.base import PART_NAME
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import (
    SCALED_FORMATS,
    PartContents,
    StoredModule,
    match_template,
    read_part,
)
from quantrecipe.schema.layout_writing import holds_many_parts
from quantrecipe.schema.markers import COMFYUI_KEY
from quantrecipe.schema.plan_metadata import TORCHAO_KEY
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.tensors import SourcePart, TensorInfo

_SCALED_FAULTS: Final = frozenset({"missing-scale", "mistyped-scale", "misshaped-scale"})
_METADATA_KEYS: Final = {"comfyui": COMFYUI_KEY, "torchao": TORCHAO_KEY}
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
    def stored(self) -> Mapping[tuple[str, str], tuple[object, ...]]:
        """How every module is read: what two layouts have in common that mean the same numbers."""
        return {
            (part, name): (module.weight, module.storage, module.rotation, module.tensors)
            for part, contents in self.contents.items()
            for name, module in contents.modules.items()
        }

    @property
    def claimed(self) -> bool:
        """Whether the files say themselves that they are in this layout.

        They do in markers, or in the entry of the metadata that only it has.
        """
        key = _METADATA_KEYS.get(self.layout.module_metadata or "")
        if key is not None and any(key in file.metadata for file in self.parts[0].files):
            return True
        templates = set(_marker_names(self.layout))
        return any(
            match_template(template, name, part.name, "module") is not None
            for template in templates
            for part in self.parts
            for name in part.tensors
        )

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
        rivals: other layouts that explain them just as well, and take them for other numbers, or
            have nothing less to be preferred for.
        alike: other layouts that explain them just as well, and take them for the same numbers.
    """

    best: Reading
    fits: bool
    rivals: tuple[str, ...]
    alike: tuple[str, ...] = ()


def recognise(
    parts: Sequence[SourcePart],
    layouts: Iterable[Layout],
    *,
    named: bool = False,
    method: str | None = None,
) -> Verdict:
    """Read files through every layout and choose.

    In this order: a layout that the files say themselves they are in; the fewest problems and
    unaccounted tensors; the most modules recognised as quantized; the fewest tensors that are only
    carried along; names with parts in them where those are branches with the same modules, and
    else names without; the layout that the ``config.json`` beside them speaks of; one that writes
    no ``config.json``, as if there was one it would have decided; the layout that holds the fewest
    formats; its name. A checkpoint where nothing is quantized is therefore in the plainest layout
    there is; one with parts in its names comes last for it.

    Args:
        parts: over the same files; several of them only if the caller knows their names.
        layouts: at least one.
        named: whether the parts' names are given; otherwise a layout that writes part names into
            tensor names finds them there.
        method: ``quant_method`` of the ``config.json`` beside them.

    Raises:
        ValueError: no layout was given.
    """
    readings = [read_all(layout, parts, named=named) for layout in layouts]
    if not readings:
        raise ValueError("no layout to try")
    tried = sorted(
        ((_rank(reading, method), reading) for reading in readings), key=lambda pair: pair[0]
    )
    (rank, best), *others = tried
    equal = [
        (other, reading)
        for other, reading in others
        if other[:_DECIDED] == rank[:_DECIDED] and best.quantized
    ]
    same = [reading.stored == best.stored for _, reading in equal]
    doubtful = [
        not one or other[:-1] == rank[:-1] for (other, _), one in zip(equal, same, strict=True)
    ]
    names = [reading.layout.name for _, reading in equal]
    return Verdict(
        best,
        not best.problems,
        rivals=tuple(name for name, doubt in zip(names, doubtful, strict=True) if doubt),
        alike=tuple(name for name, doubt in zip(names, doubtful, strict=True) if not doubt),
    )


def writes_config(layout: Layout, method: object) -> bool:
    """Whether a ``config.json`` with this ``quant_method`` is what goes with a layout."""
    return layout.config is not None and layout.config.quantization_config == method


def recognise_together(
    pieces: Sequence[Sequence[SourcePart]],
    layouts: Iterable[Layout],
    *,
    named: bool = False,
    methods: Sequence[str | None] = (),
) -> tuple[Reading, ...]:
    """Read several sets of files through the one layout that explains them best together.

    Args:
        pieces: the sets.
        layouts: at least one.
        named: as for ``recognise``.
        methods: ``quant_method`` of the ``config.json`` beside each set; empty: there are none.

    Raises:
        ValueError: no layout was given.
    """
    tried = []
    said = methods or [None] * len(pieces)
    for layout in layouts:
        readings = tuple(read_all(layout, parts, named=named) for parts in pieces)
        ranks = [
            _rank(reading, method)[:-1] for reading, method in zip(readings, said, strict=True)
        ]
        unread = sum(bool(reading.problems) for reading in readings)
        # What files say of themselves comes first: a layout that knows no codes would have no fault
        # to find with them.
        unclaimed = sum(rank[1] for rank in ranks)
        key = (unclaimed, unread, *map(sum, zip(*ranks, strict=True)), layout.name)
        tried.append((key, readings))
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


def _marker_names(layout: Layout) -> Iterator[str]:
    for scaled in SCALED_FORMATS:
        templates = getattr(layout.modules, scaled)
        if templates is not None and templates.marker is not None:
            yield from (templates.marker.name, *templates.marker.aliases)


def _are_branches(reading: Reading) -> bool:
    """Whether parts found in names have the same modules, as the branches of one network do."""
    modules = [contents.modules.keys() for contents in reading.contents.values()]
    return len(modules) > 1 and all(names == modules[0] for names in modules)


_Rank = tuple[bool, bool, int, int, int, bool, bool, bool, bool, int, str]
_DECIDED: Final = 7
"""How many fields of a rank the tensors decide; the rest is only told by what lies beside them."""


def _rank(reading: Reading, method: str | None = None) -> _Rank:
    layout = reading.layout
    problems = reading.problems
    recognised = reading.quantized + sum(problem.kind in _SCALED_FAULTS for problem in problems)
    others = sum(len(contents.others) for contents in reading.contents.values())
    in_names = "{part}" in layout.others.name
    return (
        # Any dotted name begins with what could be a part; with nothing quantized behind it, taking
        # it for one would only hide what is wrong with the module of that name.
        in_names and not recognised,
        not reading.claimed,
        len(problems),
        -recognised,
        others,
        in_names and not _are_branches(reading),
        not in_names,
        not (recognised and writes_config(layout, method)),
        layout.config is not None,
        len(layout.holds),
        layout.name,
    )
