"""The plan, as a table that a person likes to read and as JSON."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from quantrecipe.cli.tables import human_bytes, table
from quantrecipe.schema.base import Model
from quantrecipe.schema.name_groups import collapse, natural, skeleton
from quantrecipe.schema.plan import Plan, PlannedModule, PlannedTensor, SmoothingGroup
from quantrecipe.schema.schemes import (
    AnyWeight,
    ClipSearch,
    GgmlRecords,
    Nf4,
    PlainWeight,
    ScaledWeight,
    Scheme,
)

_TITLES: Final = MappingProxyType(
    {"quantized": "Quantized", "protected": "Protected", "passthrough": "Passed through"}
)
_EXPECTED: Final = MappingProxyType(
    {
        "quantized": ("quantized",),
        "protected": ("lossless", "cast", "dequantized"),
        "passthrough": ("lossless",),
    }
)
"""What becomes of numbers in a table where nothing more has to be said of it."""

TRANSFERS: Final = MappingProxyType(
    {
        "lossless": "the same numbers, bit for bit",
        "inverted": "the same codes and scales; the one scale over all of them is stored as 1 by "
        "it, which float32 rounds",
        "cast": "plain numbers in another dtype",
        "quantized": "codes from plain numbers",
        "requantized": "codes from numbers that were codes before: rounded twice",
        "dequantized": "plain numbers from codes",
    }
)
"""What becomes of the numbers of a module, in the order of totals."""

_LONGEST_REASON: Final = 48
_WIDTH: Final = 96
_LONGEST_PATTERN: Final = 72
_LIST: Final = re.compile(r"\{[0-9,.]+\}")
_MOST_FILES: Final = 16


def describe_weight(weight: AnyWeight) -> str:
    """A weight format in a few words: ``int8 channel``, ``int8 group 64``, ``bfloat16``."""
    if isinstance(weight, PlainWeight):
        return weight.format
    extra = ""
    if weight.granularity == "group":
        extra = f" {weight.group_size}"
    if isinstance(weight, GgmlRecords):
        return weight.format
    if isinstance(weight, Nf4):
        extra = f" {weight.block_size}" + (", double-quantized" if weight.double_quantized else "")
    elif weight.granularity == "block":
        extra = f" {weight.block_size[0]}x{weight.block_size[1]}"
    if weight.has_zero_points:
        extra += " with zero points"
    return f"{weight.format} {weight.granularity}{extra}"


def describe_scheme(name: str, scheme: Scheme) -> str:
    """A scheme in one line."""
    pieces = [describe_weight(scheme.weight)]
    if isinstance(scheme.weight, ScaledWeight) and isinstance(scheme.weight.quantizer, ClipSearch):
        search = scheme.weight.quantizer
        weighed = "" if search.statistics is None else ", weighed by inputs"
        pieces.append(f"clip ratios 1 to {search.min_clip_ratio:g}, {search.steps} steps{weighed}")
    if scheme.activation is not None:
        pieces.append(
            f"activations {scheme.activation.format} per {scheme.activation.granularity}, dynamic"
        )
    if scheme.smoothing is not None:
        smoothing = scheme.smoothing
        alpha = " or ".join(f"{each:g}" for each in smoothing.candidates)
        power = ", powers of two" if smoothing.power_of_two else ""
        pieces.append(f"{smoothing.kind} alpha {alpha} applied {smoothing.apply}{power}")
    if scheme.rotation is not None:
        pieces.append(f"rotation {scheme.rotation.kind} of {scheme.rotation.size}")
    return f"{name}: {'; '.join(pieces)}"


def plan_text(plan: Plan) -> str:
    """The plan for people."""
    lines = [
        f"{plan.recipe.name}: {plan.source_layout.name} -> {plan.target_layout.name}",
        *_schemes(plan),
        "",
    ]
    for disposition, title in _TITLES.items():
        modules = [module for module in plan.modules if module.disposition == disposition]
        if modules:
            lines += [*_modules(title, modules, several=len(plan.parts) > 1), ""]
    shared = _shared_factors(plan)
    if shared:
        lines += [*shared, ""]
    if plan.others:
        size = human_bytes(sum(other.output.nbytes for other in plan.others))
        lines += [f"Copied as they are: {_count(len(plan.others), 'other tensor')}, {size}", ""]
    lines += [_files_table(plan), "", _total(plan), *_numbers(plan)]
    lines += [f"statistics: {path}" for _, path in sorted(plan.statistics.items())]
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def _schemes(plan: Plan) -> list[str]:
    used = {module.scheme for module in plan.modules}
    return [
        f"  {describe_scheme(name, scheme)}"
        for name, scheme in plan.recipe.schemes.items()
        if name in used
    ]


@dataclass(frozen=True, slots=True)
class _Row:
    """Modules that one line stands for: alike but for a number in their names, and their part."""

    pattern: str
    shape: str
    weight: str
    transfer: str
    why: str
    modules: tuple[PlannedModule, ...]

    @property
    def parts(self) -> str:
        return ", ".join(dict.fromkeys(module.part for module in self.modules))


@dataclass(frozen=True, slots=True)
class _Column:
    """What stands in a column; ``common`` is how the title says it where all rows agree."""

    header: str
    align: str
    cells: Sequence[str]
    common: str | None = None


def _modules(title: str, modules: Sequence[PlannedModule], *, several: bool) -> list[str]:
    """A table of modules: what holds for all of them above it, reasons too long for it below."""
    rows = _rows(modules)
    long = dict.fromkeys(row.why for row in rows if len(row.why) > _LONGEST_REASON)
    notes = {reason: f"[{number}]" for number, reason in enumerate(long, start=1)}
    parts = [row.parts for row in rows]
    repeated = [part == above for part, above in zip(parts, ["", *parts], strict=False)]
    cells = ["" if again else part for part, again in zip(parts, repeated, strict=True)]
    why, said = ("scheme", "scheme ") if modules[0].scheme is not None else ("reason", "reason: ")
    columns = [
        _Column("part", "l", cells, "" if len(set(parts)) == 1 else None),
        _Column("modules", "l", [_shortened(row.pattern) for row in rows]),
        _Column("n", "r", [f"{len(row.modules):,}" for row in rows]),
        _Column("shape", "l", [row.shape for row in rows]),
        _agreed("weight", [row.weight for row in rows]),
        *_transfers(rows, modules[0].disposition),
        _Column("in", "r", [human_bytes(sum(m.source.nbytes for m in r.modules)) for r in rows]),
        _Column("out", "r", [human_bytes(sum(m.nbytes for m in r.modules)) for r in rows]),
        _agreed(why, [notes.get(row.why, row.why) for row in rows], "" if notes else said),
    ]
    shown = [column for column in columns if column.common is None]
    head = _count(len(modules), "module")
    if several and columns[0] not in shown:
        head += f" of {parts[0].replace(', ', ' and ')}"
    head = ", ".join([head, *(column.common for column in columns if column.common)])
    text = table(
        list(zip(*(column.cells for column in shown), strict=True)),
        [column.header for column in shown],
        "".join(column.align for column in shown),
    )
    below = [
        textwrap.fill(reason, _WIDTH, initial_indent=f"{note} ", subsequent_indent="    ")
        for reason, note in notes.items()
    ]
    return [f"{title}: {head}", *textwrap.indent("\n".join([text, *below]), "  ").splitlines()]


def _transfers(rows: Sequence[_Row], disposition: str) -> list[_Column]:
    """What becomes of the numbers, where that is not what the table's title says anyway."""
    found = [row.transfer for row in rows]
    if set(found) <= set(_EXPECTED[disposition]):
        return []
    return [_agreed("numbers", found)]


def totals(plan: Plan) -> dict[str, int]:
    """How many modules have what become of their numbers."""
    counts: Counter[str] = Counter(module.transfer for module in plan.modules)
    return {name: counts[name] for name in TRANSFERS if counts[name]}


def rounded_twice(plan: Plan) -> str | None:
    """One line about modules that are requantized, if there are any."""
    modules = [module for module in plan.modules if module.transfer == "requantized"]
    if not modules:
        return None
    kinds = Counter(
        f"{describe_weight(module.source.weight)} -> {describe_weight(module.weight)}"
        for module in modules
    )
    how = ", ".join(kinds)
    return (
        f"not lossless: {_count(len(modules), 'module')} of {len(plan.modules):,} "
        f"{'is' if len(modules) == 1 else 'are'} requantized ({how})"
    )


def _numbers(plan: Plan) -> list[str]:
    """Totals, and what the words mean that are no plain ones."""
    found = totals(plan)
    lines = ["numbers: " + ", ".join(f"{count:,} {name}" for name, count in found.items())]
    if "inverted" in found:
        lines.append(f"  inverted: {TRANSFERS['inverted']}")
    worst = rounded_twice(plan)
    return lines if worst is None else [*lines, worst]


def _shared_factors(plan: Plan) -> list[str]:
    """Which modules share their smoothing factors: groups that differ in numbers in one line."""
    groups = [group for group in plan.smoothing_groups if len(group.modules) > 1]
    if not groups:
        return []
    alike: dict[tuple[tuple[str, ...], ...], list[SmoothingGroup]] = {}
    for group in groups:
        key = tuple(tuple(map(skeleton, names)) for names in (group.modules, group.unsmoothed))
        alike.setdefault(key, []).append(group)
    count = sum(len(group.modules) for group in groups)
    lines = [f"Shared smoothing factors: {count:,} modules in {_count(len(groups), 'group')}"]
    for members in alike.values():
        text = f"{len(members):>4,} x {_names_of(group.modules for group in members)}"
        if members[0].unsmoothed:
            text += f"; not smoothed: {_names_of(group.unsmoothed for group in members)}"
        lines.append(
            textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="         ")
        )
    return "\n".join(lines).splitlines()


def _names_of(groups: Iterable[tuple[str, ...]]) -> str:
    """Groups of as many names each: patterns of all first names, all second ones, and so on."""
    patterns = [found.pattern for names in zip(*groups, strict=True) for found in collapse(names)]
    return ", ".join(map(_shortened, dict.fromkeys(patterns)))


def _agreed(header: str, cells: Sequence[str], prefix: str = "") -> _Column:
    """A column that the title stands for where all its cells are alike."""
    if len(set(cells)) > 1:
        return _Column(header, "l", cells)
    return _Column(header, "l", cells, cells[0] and prefix + cells[0])


def _shortened(pattern: str) -> str:
    """A pattern without the middle of the longest list in it, where it would be too wide."""
    if len(pattern) <= _LONGEST_PATTERN:
        return pattern
    lists = [found for found in _LIST.findall(pattern) if found.count(",") > 4]
    for found in sorted(lists, key=len, reverse=True)[:1]:
        items = found.strip("{}").split(",")
        return pattern.replace(found, "{" + ",".join([*items[:3], "...", items[-1]]) + "}", 1)
    return pattern


def _one_line(text: str) -> str:
    """Text that somebody wrote, without line breaks and what else a terminal would act upon."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _rows(modules: Iterable[PlannedModule]) -> list[_Row]:
    """Modules as rows: parts in which the same becomes of the same modules share theirs."""
    alike: dict[tuple[str, ...], list[PlannedModule]] = {}
    for module in modules:
        before, after = describe_weight(module.source.weight), describe_weight(module.weight)
        shape = f"[{module.source.out_features}, {module.source.in_features}]"
        weight = f"{before} -> {after}" if before != after else before
        why = module.scheme or _one_line(module.reason or "")
        key = (skeleton(module.name), module.part, shape, weight, module.transfer, why)
        alike.setdefault(key, []).append(module)
    found: dict[tuple[str, str, str, str, str], list[PlannedModule]] = {}
    for (_, _, shape, weight, transfer, why), members in alike.items():
        by_name = {module.name: module for module in members}
        for group in collapse(by_name):
            same = found.setdefault((group.pattern, shape, weight, transfer, why), [])
            same += [by_name[name] for name in group.names]
    rows = [
        _Row(pattern, shape, weight, transfer, why, tuple(members))
        for (pattern, shape, weight, transfer, why), members in found.items()
    ]
    # What all parts have in common first, then part by part.
    return sorted(
        rows,
        key=lambda row: (-row.parts.count(","), row.parts, natural(row.modules[0].name)),
    )


def _files_table(plan: Plan) -> str:
    rows = [(file.path, f"{len(file.tensors):,}", f"{file.size:,}") for file in plan.files]
    if len(rows) > _MOST_FILES:
        hidden = plan.files[_MOST_FILES - 2 : -1]
        tensors, size = sum(len(f.tensors) for f in hidden), sum(f.size for f in hidden)
        more = (f"... {len(hidden):,} more ...", f"{tensors:,}", f"{size:,}")
        rows = [*rows[: _MOST_FILES - 2], more, rows[-1]]
    return table(rows, ("file", "tensors", "bytes"), "lrr")


def _total(plan: Plan) -> str:
    ratio = plan.output_bytes / plan.source_bytes if plan.source_bytes else 1.0
    return (
        f"{_count(len(plan.modules), 'module')}, {human_bytes(plan.source_bytes)} in, "
        f"{human_bytes(plan.output_bytes)} out ({ratio:.0%})"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan for machines: every module, every tensor, every offset."""
    return {
        "recipe": plan.recipe.name,
        "recipe_sha256": plan.recipe_sha256,
        "source_layout": plan.source_layout.name,
        "target_layout": plan.target_layout.name,
        "statistics": {name: str(path) for name, path in sorted(plan.statistics.items())},
        "parts": {part.name: [str(file.path) for file in part.files] for part in plan.parts},
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "transfers": totals(plan),
        "modules": [
            {
                "part": module.part,
                "name": module.name,
                "disposition": module.disposition,
                "transfer": module.transfer,
                "scheme": module.scheme,
                "reason": module.reason,
                "taken_by": module.pointer,
                "pattern": module.pattern,
                "shape": [module.source.out_features, module.source.in_features],
                "source": module.source.weight.model_dump(mode="json"),
                "weight": module.weight.model_dump(mode="json"),
                "activation": _optional(module.activation),
                "smoothing": _optional(module.smoothing),
                "rotation": _optional(module.rotation),
                "source_tensors": {
                    role: info.name for role, info in sorted(module.source.tensors.items())
                },
                "bytes_in": module.source.nbytes,
                "bytes_out": module.nbytes,
                "tensors": {role: _tensor(tensor) for role, tensor in module.outputs.items()},
            }
            for module in plan.modules
        ],
        "others": [
            {
                "part": other.part,
                "name": other.name,
                "source_tensor": other.source.name,
                "tensor": _tensor(other.output),
            }
            for other in plan.others
        ],
        "smoothing_groups": [
            {
                "part": group.part,
                "modules": list(group.modules),
                "unsmoothed": list(group.unsmoothed),
            }
            for group in plan.smoothing_groups
        ],
        "files": [
            {"path": file.path, "bytes": file.size, "tensors": len(file.tensors)}
            for file in plan.files
        ]
        + [
            {"path": path, "bytes": len(content), "tensors": 0}
            for path, content in plan.extra_files.items()
        ],
        "warnings": [warning.as_dict() for warning in plan.warnings],
    }


def _optional(model: Model | None) -> Any:
    return None if model is None else model.model_dump(mode="json")


def _tensor(tensor: PlannedTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "file": tensor.file,
        "offset": tensor.offset,
        "bytes": tensor.nbytes,
    }
