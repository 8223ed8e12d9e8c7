"""What ``inspect`` prints: for people and for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final

from quantrecipe.cli.examining import Examined
from quantrecipe.cli.tables import human_bytes, human_count, table
from quantrecipe.schema.canonical import recipe_digest
from quantrecipe.schema.inspection import ModuleGroup, PartReport, formats_used
from quantrecipe.schema.planning import METADATA_KEY
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.storage import WRITTEN_ANEW

_LONGEST: Final = 72
_ALWAYS: Final = frozenset({"weight", "weight_scale", "second_scale", "marker", *WRITTEN_ANEW})
_FEW: Final = 3
_MOST_ROWS: Final = 60


def inspection_json(result: Examined) -> dict[str, Any]:
    """Everything that was found out, as JSON values."""
    origin = result.origin
    return {
        "path": str(result.survey.root),
        "made_by": None
        if origin is None
        else {
            "recipe": origin.recipe.name,
            "recipe_sha256": recipe_digest(origin.recipe),
            "evidence": origin.evidence,
        },
        "totals": _totals(result),
        "parts": [part.as_dict() for part in result.parts],
        "formats": [asdict(use) for use in formats_used(result.parts)],
        "files": [
            {
                "path": file.relative,
                "bytes": file.size,
                "tensors": len(file.tensors),
                "metadata": dict(file.metadata),
            }
            for file in result.survey.files
        ],
        "sidecars": result.sidecars,
        "notes": result.notes,
        "not_read": [problem.as_dict() for problem in result.not_read],
        "problems": [problem.as_dict() for problem in result.problems],
    }


def inspection_text(result: Examined, *, every: bool = False) -> str:
    """Everything that was found out, for people.

    Args:
        result: what to tell.
        every: whether to leave nothing out of long tables and lists.
    """
    blocks = [table(list(_head(result)))]
    uses = [
        (
            use.format,
            use.granularity or "-",
            use.scale_dtype or "-",
            use.modules,
            human_count(use.parameters),
            human_bytes(use.nbytes),
        )
        for use in formats_used(result.parts)
    ]
    if uses:
        headers = ("FORMAT", "SCALE FOR EACH", "SCALES", "MODULES", "WEIGHTS", "BYTES")
        blocks.append(table(uses, headers, "lllrrr"))
    for parts in _alike(result.parts):
        blocks += _part_blocks(parts, every)
    if result.notes:
        blocks.append("\n".join(f"note: {note}" for note in result.notes))
    blocks.append("\n".join(_verdict(result, every)))
    return "\n\n".join(block for block in blocks if block)


def _totals(result: Examined) -> dict[str, int]:
    files = result.survey.files
    modules = [group for part in result.parts for group in part.modules]
    return {
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "tensors": sum(len(file.tensors) for file in files),
        "modules": sum(group.count for group in modules),
        "quantized": sum(group.count for group in modules if group.granularity is not None),
    }


def _head(result: Examined) -> Iterator[tuple[str, str]]:
    totals = _totals(result)
    yield "checkpoint", str(result.survey.root)
    counts = [
        _plural(totals["files"], "file"),
        human_bytes(totals["bytes"]),
        _plural(totals["tensors"], "tensor"),
        _plural(totals["modules"], "module"),
        f"{totals['quantized']:,} of them quantized",
    ]
    yield "size", ", ".join(counts)
    for (layout, reason), names in _layouts(result.parts).items():
        of = f" [{', '.join(names)}]" if len(result.parts) > 1 else ""
        yield "layout", f"{layout}{of}: {reason}"
    if result.origin is not None:
        yield "made by", f"{result.origin.recipe.name} ({recipe_digest(result.origin.recipe)[:12]})"
    for key, value in _metadata(result).items():
        yield "metadata", f"{key}: {value}"
    if result.sidecars:
        texts = [f"{name} ({what})" if what else name for name, what in result.sidecars.items()]
        yield "beside it", _shortened(texts)


def _layouts(parts: Iterable[PartReport]) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for part in parts:
        layout = part.layout or "unknown"
        if part.foreign is not None:
            layout = f"{part.foreign}, which is not read"
        found.setdefault((layout, part.reason), []).append(part.name)
    return found


def _metadata(result: Examined) -> dict[str, str]:
    files = result.survey.files
    keys = {key for file in files for key in file.metadata}
    shown = {}
    for key in sorted(keys):
        values = Counter(file.metadata[key] for file in files if key in file.metadata)
        text, count = values.most_common(1)[0]
        if key == METADATA_KEY and result.origin is not None:
            text = f"the recipe ({len(text):,} characters)"
        if len(text) > _LONGEST:
            text = f"{text[:_LONGEST]}... ({len(text):,} characters)"
        shown[key] = text if len(values) == 1 else f"{text} (in {count} of {len(files)} files)"
    return shown


def _alike(parts: Iterable[PartReport]) -> list[list[PartReport]]:
    groups: dict[tuple[object, ...], list[PartReport]] = {}
    for part in parts:
        groups.setdefault(part.contents, []).append(part)
    return list(groups.values())


def _part_blocks(parts: Sequence[PartReport], every: bool) -> Iterator[str]:
    first = parts[0]
    names = [
        part.name if part.location in (".", part.name) else f"{part.name} ({part.location})"
        for part in parts
    ]
    each = " each" if len(parts) > 1 else ""
    yield (
        f"part{'s' if each else ''} {', '.join(names)}: "
        f"{_plural(first.tensors, 'tensor')}, {human_bytes(first.nbytes)}{each}"
    )
    modules = [
        (
            group.pattern,
            list(group.shape),
            _stored_as(group),
            " + ".join(role for role in group.roles if role not in _ALWAYS) or "-",
            f"x{group.count}",
            human_bytes(group.nbytes),
        )
        for group in first.modules
    ]
    if modules:
        headers = ("MODULES", "OUT, IN", "STORED AS", "WITH", "", "BYTES")
        yield _cut(modules, headers, "llllrr", every)
    others = [
        (
            group.pattern,
            list(group.shape),
            group.dtype,
            f"x{group.count}",
            human_bytes(group.nbytes),
        )
        for group in first.others
    ]
    if others:
        title = "OTHER TENSORS" if modules else "TENSORS"
        yield _cut(others, (title, "SHAPE", "DTYPE", "", "BYTES"), "lllrr", every)


def _stored_as(group: ModuleGroup) -> str:
    text = " ".join(filter(None, (group.format, group.granularity)))
    return text if group.rotation is None else f"{text}, rotated by {group.rotation}"


def _cut(rows: Sequence[Sequence[object]], headers: Sequence[str], align: str, every: bool) -> str:
    if every or len(rows) <= _MOST_ROWS:
        return table(rows, headers, align)
    shown = table(rows[:_MOST_ROWS], headers, align)
    return f"{shown}\n... and {len(rows) - _MOST_ROWS} more rows (--all shows them)"


def _verdict(result: Examined, every: bool) -> Iterator[str]:
    problems = result.problems
    if not problems:
        partly = result.foreign or result.not_read
        known = ", as far as can be told of what is not read" if partly else ""
        yield f"Nothing looks wrong{known}."
        return
    yield f"WHAT LOOKS WRONG ({len(problems)})"
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    for kind, found in kinds.items():
        hint = found[0].hint
        shown = found if every else found[:_FEW]
        for problem in shown:
            yield f"{kind}: {problem.where}: {problem.message}"
        if len(found) > len(shown):
            yield f"{kind}: ... and {len(found) - len(shown)} more (--all shows them)"
        if hint:
            yield f"  {hint}"


def _shortened(texts: Sequence[str]) -> str:
    more = len(texts) - 8
    return ", ".join(texts[:8]) + (f" and {more} more" if more > 0 else "")


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
