"""What a checkpoint consists of, summed up: formats, modules and other tensors by pattern."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from quantrecipe.schema.foreign_layouts import Sighting
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.name_groups import collapse, natural, skeleton
from quantrecipe.schema.recognition import Reading
from quantrecipe.schema.schemes import AnyWeight, ScaledWeight
from quantrecipe.schema.tensors import SourcePart, TensorInfo


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """Modules of one shape that are stored alike and differ in numbers of their names only.

    Attributes:
        pattern: matches exactly these modules.
        shape: out and in features.
        format, granularity, scale_dtype: how their weights are stored; ``None`` without scales.
        group_size: how many rows and columns share a scale, unless all of a row or a weight do.
        second_level: what a second level of scales is stored in.
        rotation: how many columns were rotated together, where they were.
        roles: what each consists of.
        count, parameters, nbytes: of all of them; bytes include scales and biases.
    """

    pattern: str
    shape: tuple[int, int]
    format: str
    granularity: str | None
    scale_dtype: str | None
    group_size: tuple[int, int] | None
    second_level: str | None
    rotation: int | None
    roles: tuple[str, ...]
    count: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors of one shape and dtype that differ in numbers of their names only."""

    pattern: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FormatUse:
    """How much of a checkpoint is in one format; ``parameters`` counts weights only."""

    format: str
    granularity: str | None
    scale_dtype: str | None
    modules: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PartReport:
    """One part.

    Attributes:
        name: of the part; given, found in the tensors' names, or made up from the file's.
        location: where its files lie below the root, with ``/``.
        layout: the layout it is in; ``None`` if no known one explains it.
        foreign: the layout it is in, where that is recognised but not read.
        reason: how that is known, one sentence.
        modules, others: summed up; without a layout every tensor is one of the others.
        files: how many files it lies in.
        tensors, nbytes: how many tensors are its own, and their bytes.
    """

    name: str
    location: str
    layout: str | None
    foreign: str | None
    reason: str
    modules: tuple[ModuleGroup, ...]
    others: tuple[TensorGroup, ...]
    files: int
    tensors: int
    nbytes: int

    @property
    def contents(self) -> tuple[object, ...]:
        """What two parts have in common when one table can speak for both."""
        return self.layout, self.foreign, self.reason, self.modules, self.others

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def report_reading(
    reading: Reading, location: str, *, sure: bool, reason: str
) -> tuple[PartReport, ...]:
    """The parts of files that were read through a layout, which they are in if that is ``sure``."""
    reports = []
    for part in reading.parts:
        contents = reading.contents[part.name]
        own = [part.tensors[name] for name in contents.claimed]
        if len(reading.parts) == 1:
            own += reading.unclaimed
        inside = {info.name for module in contents.modules.values() for info in _tensors(module)}
        rest = {info.name: name for name, info in contents.others.items()}
        others = [(rest.get(info.name, info.name), info) for info in own]
        reports.append(
            PartReport(
                name=part.name,
                location=location,
                layout=reading.layout.name if sure else None,
                foreign=None,
                reason=reason,
                modules=group_modules(contents.modules.values()),
                others=group_tensors((n, info) for n, info in others if info.name not in inside),
                files=len(part.files),
                tensors=len(own),
                nbytes=sum(info.nbytes for info in own),
            )
        )
    return tuple(reports)


def report_foreign(part: SourcePart, location: str, sighting: Sighting) -> PartReport:
    """A part in a layout that is not read: its tensors as they are called."""
    return PartReport(
        name=part.name,
        location=location,
        layout=None,
        foreign=sighting.layout.name,
        reason=f"{sighting.evidence}: {sighting.layout.written_by}",
        modules=(),
        others=group_tensors(part.tensors.items()),
        files=len(part.files),
        tensors=len(part.tensors),
        nbytes=sum(info.nbytes for info in part.tensors.values()),
    )


def group_modules(modules: Iterable[StoredModule]) -> tuple[ModuleGroup, ...]:
    """Modules that differ in numbers of their names only, as one entry each pattern."""
    families: dict[tuple[object, ...], dict[str, StoredModule]] = {}
    for module in modules:
        shape = (module.out_features, module.in_features)
        key = (
            skeleton(module.name),
            shape,
            module.weight,
            module.rotation,
            tuple(module.tensors),
        )
        families.setdefault(key, {})[module.name] = module
    groups = []
    for family in families.values():
        first = next(iter(family.values()))
        for names in collapse(family):
            mine = [family[name] for name in names.names]
            groups.append(
                ModuleGroup(
                    pattern=names.pattern,
                    shape=(first.out_features, first.in_features),
                    format=first.weight.format,
                    granularity=granularity_text(first.weight),
                    scale_dtype=_scale_dtype(first.weight),
                    group_size=group_size(first.weight),
                    second_level=_second_level(first),
                    rotation=first.rotation.size if first.rotation is not None else None,
                    roles=tuple(first.tensors),
                    count=len(mine),
                    parameters=first.out_features * first.in_features * len(mine),
                    nbytes=sum(module.nbytes for module in mine),
                )
            )
    return tuple(sorted(groups, key=lambda group: _order(group.pattern)))


def group_tensors(tensors: Iterable[tuple[str, TensorInfo]]) -> tuple[TensorGroup, ...]:
    """Tensors that differ in numbers of their names only, as one entry each pattern."""
    families: dict[tuple[object, ...], dict[str, TensorInfo]] = {}
    for name, info in tensors:
        families.setdefault((skeleton(name), info.shape, info.dtype), {})[name] = info
    groups = []
    for family in families.values():
        first = next(iter(family.values()))
        for names in collapse(family):
            nbytes = sum(family[name].nbytes for name in names.names)
            groups.append(
                TensorGroup(names.pattern, first.shape, first.dtype, len(names.names), nbytes)
            )
    return tuple(sorted(groups, key=lambda group: _order(group.pattern)))


def formats_used(parts: Iterable[PartReport]) -> tuple[FormatUse, ...]:
    """How much is in which format, the largest first."""
    sums: dict[tuple[str, str | None, str | None], tuple[int, int, int]] = {}
    for part in parts:
        for group in part.modules:
            key = (group.format, group.granularity, group.scale_dtype)
            modules, parameters, nbytes = sums.get(key, (0, 0, 0))
            sums[key] = (
                modules + group.count,
                parameters + group.parameters,
                nbytes + group.nbytes,
            )
    ordered = sorted(sums.items(), key=lambda item: (-item[1][2], str(item[0])))
    return tuple(FormatUse(*key, *counts) for key, counts in ordered)


def granularity_text(weight: AnyWeight) -> str | None:
    """``channel``, ``group 64``, ``block 128x128``; ``None`` without scales.

    Scales of two levels and zero points are said too: ``group 16, two levels``.
    """
    if not isinstance(weight, ScaledWeight):
        return None
    text: str = weight.granularity
    size = group_size(weight)
    if size is not None:
        rows, columns = size
        text += f" {columns}" if rows == 1 else f" {rows}x{columns}"
    if weight.has_zero_points:
        text += " with zero points"
    return text + (", two levels" if weight.has_two_levels else "")


def group_size(weight: AnyWeight) -> tuple[int, int] | None:
    """How many rows and columns share a scale, unless all of a row or all of a weight do."""
    if not isinstance(weight, ScaledWeight) or weight.granularity in ("tensor", "channel"):
        return None
    return weight.group_shape(1, 1)


def _tensors(module: StoredModule) -> Iterable[TensorInfo]:
    return module.tensors.values()


def _scale_dtype(weight: AnyWeight) -> str | None:
    return weight.scale_dtype if isinstance(weight, ScaledWeight) else None


def _second_level(module: StoredModule) -> str | None:
    info = module.tensors.get("second_scale")
    return None if info is None else info.dtype


def _order(pattern: str) -> tuple[tuple[int, str], ...]:
    return natural(pattern.replace("{", ""))
