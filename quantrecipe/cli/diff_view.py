"""What comparing two checkpoints found, for people and for machines."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

from quantrecipe.cli.plan_view import describe_weight
from quantrecipe.cli.tables import human_bytes, table
from quantrecipe.evaluate import Compared, Diff, Distance, Failure
from quantrecipe.evaluate.comparison.records import VERDICTS, Setting, SideFacts, Stored, is_below
from quantrecipe.schema.name_groups import collapse, natural, skeleton

JSON_VERSION: Final = 1

_WORDS: Final = {"only-in-a": "only in A", "only-in-b": "only in B"}
_PHRASES: Final = {**_WORDS, "dtype": "in another dtype"}
_MOST_ROWS: Final = 60
_FEW: Final = 8


def diff_text(
    found: Diff,
    failures: Collection[Failure],
    min_sqnr: float | None,
    *,
    worst: int,
    every: bool = False,
) -> str:
    """The verdict in one line, the checkpoints, what differs by pattern, and the worst modules.

    Args:
        found: what to tell.
        failures: differences that are not allowed.
        min_sqnr: the least SQNR of those that are.
        worst: how many of the modules with the least SQNR to list.
        every: whether to leave nothing out.
    """
    blocks = [_verdict(found, failures, min_sqnr), _sides(found)]
    differing = [entry for entry in found.entries if every or entry.verdict != "same"]
    if differing:
        blocks.append(_groups(differing, several=len(found.parts) > 1, every=every))
    blocks.append(_worst(found, worst, min_sqnr))
    blocks.append(_settings(found, every))
    blocks.append("\n".join(f"note: {note}" for note in found.notes))
    return "\n\n".join(block for block in blocks if block)


def _verdict(found: Diff, failures: Collection[Failure], min_sqnr: float | None) -> str:
    """One line that answers the question."""
    if found.verdict == "same":
        said = f"same: {_counted(found, ['same'])}, bit for bit"
    elif found.verdict == "moved":
        said = f"moved: the same numbers, stored otherwise: {_counted(found, ['moved'])}"
    else:
        told = [_counted(found, [verdict], verdict) for verdict in reversed(VERDICTS[1:])]
        said = f"different: {', '.join(text for text in told if text)}"
    if found.verdict != "same":
        same = _counted(found, ["same"])
        said += f"; {same} the same" if same else ""
    lowest = _lowest(found.entries)
    if lowest is not None:
        said += f"; worst {_decibels(lowest.distance, ' dB')} ({_title(found, lowest)})"
    allowed = not found.failed(failures, min_sqnr) and not found.failed_settings(failures)
    if found.verdict == "different" and allowed:
        said += "; all of it allowed"
    below = sum(is_below(entry.distance, min_sqnr) for entry in found.entries)
    if below:
        said += f"; {below:,} below {min_sqnr:g} dB"
    beside = found.failed_settings(failures)
    if beside:
        said += f"; {_count(len(beside), 'setting')} beside the numbers"
    return said


def _counted(found: Diff, verdicts: Iterable[str], said: str | None = None) -> str:
    """``36 modules and 2 tensors requantized``; nothing where there are none."""
    texts = []
    for kind in ("module", "tensor"):
        counts = found.counts("module" if kind == "module" else "tensor")
        number = sum(count for verdict, count in counts.items() if verdict in verdicts)
        if number:
            texts.append(_count(number, kind))
    if not texts:
        return ""
    return " and ".join(texts) + (f" {_PHRASES.get(said, said)}" if said is not None else "")


def _lowest(entries: Iterable[Compared]) -> Compared | None:
    """What has the least SQNR, if anything has one."""
    measured = [each for each in entries if each.distance is not None and not each.distance.exact]
    return min(measured, key=_order, default=None)


def _order(entry: Compared) -> tuple[float, str, str]:
    return (
        entry.distance.decibels if entry.distance is not None else math.inf,
        entry.part,
        entry.name,
    )


def _title(found: Diff, entry: Compared) -> str:
    return f"{entry.part}: {entry.name}" if len(found.parts) > 1 else entry.name


def _sides(found: Diff) -> str:
    sides = table([(letter, *_side(side)) for letter, side in (("A", found.a), ("B", found.b))])
    pairs = [pair for pair in found.parts if pair.a is not None and pair.b is not None]
    told = [
        f"part {pair.a} is compared with {pair.b}"
        + (f", by the names {pair.names_of}" if pair.names_of is not None else "")
        for pair in pairs
        if pair.a != pair.b or pair.names_of is not None
    ]
    return "\n".join([sides, *told])


def _side(side: SideFacts) -> tuple[str, str, str, str]:
    layouts = ", ".join(dict.fromkeys(part.layout for part in side.parts))
    made_by = f"made by {side.recipe}" if side.recipe is not None else ""
    return (
        str(side.path),
        layouts,
        f"{_count(side.files, 'file')}, {human_bytes(side.nbytes)}",
        made_by,
    )


def _groups(entries: Sequence[Compared], *, several: bool, every: bool) -> str:
    """A line for all that differ alike and in numbers of their names only, whatever their part."""
    families: dict[tuple[object, ...], dict[str, Compared]] = {}
    for entry in entries:
        key = _likeness(entry), entry.part, skeleton(entry.name)
        families.setdefault(key, {})[entry.name] = entry
    groups: dict[tuple[object, ...], list[Compared]] = {}
    for (likeness, *_), members in families.items():
        for group in collapse(members):
            same = groups.setdefault((group.pattern, likeness), [])
            same += [members[name] for name in group.names]
    rows = [
        _row(str(pattern), members, several)
        for (pattern, _), members in sorted(groups.items(), key=lambda item: _rank(item[1]))
    ]
    return _table(rows, several=several, every=every)


def _likeness(entry: Compared) -> tuple[object, ...]:
    """What entries have in common that one line can speak for."""
    # Where a tensor differs is its own.
    details = tuple(detail.partition(":")[0].partition(" at ")[0] for detail in entry.details)
    measured = entry.distance is not None
    return entry.verdict, entry.kind, _change(entry), details, entry.rounding, measured


def _rank(entries: Sequence[Compared]) -> tuple[object, ...]:
    """The gravest first, modules before tensors, what all parts have in common before the rest."""
    first, parts = entries[0], _parts(entries)
    grave = -VERDICTS.index(first.verdict)
    return grave, first.kind, -parts.count(","), parts, natural(first.name)


def _parts(entries: Iterable[Compared]) -> str:
    return ", ".join(dict.fromkeys(entry.part for entry in entries))


def _table(lines: Sequence[tuple[str, ...]], *, several: bool, every: bool) -> str:
    headers = ["verdict", *(["part"] if several else []), "name", "n", "stored as", "SQNR dB"]
    headers += ["error / scale", "what"]
    align = "l" + ("l" if several else "") + "lrlrrl"
    kept = [
        column
        for column in range(len(headers))
        if headers[column] not in ("SQNR dB", "error / scale", "what")
        or any(row[column] for row in lines)
    ]
    shown = lines if every else lines[:_MOST_ROWS]
    text = table(
        [[row[column] for column in kept] for row in shown],
        [headers[column] for column in kept],
        "".join(align[column] for column in kept),
    )
    if len(shown) < len(lines):
        text += f"\n... and {len(lines) - len(shown):,} more rows (--all shows them)"
    return text


def _row(pattern: str, entries: Sequence[Compared], several: bool) -> tuple[str, ...]:
    first = entries[0]
    lowest = min(entries, key=_order)
    scales = [
        each.distance.in_scales
        for each in entries
        if each.distance is not None and each.distance.in_scales is not None
    ]
    return (
        _WORDS.get(first.verdict, first.verdict),
        *([_parts(entries)] if several else []),
        pattern,
        f"{len(entries):,}",
        _change(first),
        _decibels(lowest.distance) if lowest.distance is not None else "",
        f"{max(scales):.4f}" if scales else "",
        ", ".join((*first.details, *_rounding(first)))
        + (", ..." if len({each.details for each in entries}) > 1 else ""),
    )


def _rounding(entry: Compared) -> tuple[str, ...]:
    words = {"lossless": "lossless", "b-rounded": "B is A rounded", "a-rounded": "A is B rounded"}
    return () if entry.rounding is None else (words[entry.rounding],)


def _change(entry: Compared) -> str:
    """How it is stored in A, and in B where that is otherwise."""
    texts = [_stored_as(each) for each in (entry.a, entry.b) if each is not None]
    return " -> ".join(dict.fromkeys(texts))


def _stored_as(stored: Stored) -> str:
    return (
        describe_weight(stored.weight)
        if stored.weight is not None
        else stored.tensors["tensor"].dtype
    )


def _worst(found: Diff, most: int, min_sqnr: float | None) -> str:
    measured = sorted(
        (e for e in found.entries if e.distance is not None and not e.distance.exact), key=_order
    )
    shown = measured[:most]
    if not shown:
        return ""
    several = len(found.parts) > 1
    rows = []
    for entry in shown:
        distance = entry.distance
        assert distance is not None
        worst = "not finite" if distance.worst_error is None else f"{distance.worst_error:.4g}"
        scales = "" if distance.in_scales is None else f"{distance.in_scales:.4f}"
        at = "" if distance.at is None else str(list(distance.at))
        too_low = "too low" if is_below(distance, min_sqnr) else ""
        part = [entry.part] if several else []
        rows.append([*part, entry.name, _decibels(distance), worst, scales, at, too_low])
    headers = [*(["part"] if several else []), "name", "SQNR dB", "largest error", "in scales"]
    headers += ["at", ""]
    align = ("l" if several else "") + "lrrrl"
    title = f"the {len(shown)} worst of {len(measured):,}:"
    if len(shown) == len(measured):
        title = "worst first:"
    return "\n".join([title, table(rows, headers, align)])


def _settings(found: Diff, every: bool) -> str:
    settings = (*found.metadata, *found.config)
    shown = settings if every else settings[:_FEW]
    lines = [
        f"{setting.where}{' ' + setting.key if setting.key else ''}: "
        f"{_value(setting.a)} -> {_value(setting.b)}"
        for setting in shown
    ]
    if len(shown) < len(settings):
        lines.append(f"... and {len(settings) - len(shown):,} more (--all shows them)")
    return table([[line] for line in lines])


def _value(text: str | None) -> str:
    return "nothing" if text is None else text


def _decibels(distance: Distance | None, unit: str = "") -> str:
    if distance is None or distance.exact:
        return "exact"
    return "not finite" if distance.sqnr_db is None else f"{distance.sqnr_db:.2f}{unit}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def diff_json(found: Diff, failures: Collection[Failure], min_sqnr: float | None) -> dict[str, Any]:
    """The same for machines, with every module and tensor; docs/diffing.md describes it."""
    failed = found.failed(failures, min_sqnr)
    names = {id(entry) for entry in failed}
    return {
        "version": JSON_VERSION,
        "verdict": found.verdict,
        "failed": bool(failed or found.failed_settings(failures)),
        "fail_on": [name for name in (*VERDICTS, "metadata", "config") if name in failures],
        "min_sqnr_db": min_sqnr,
        "a": _side_json(found.a),
        "b": _side_json(found.b),
        "parts": [{"a": pair.a, "b": pair.b, "names_of": pair.names_of} for pair in found.parts],
        "counts": {"modules": found.counts("module"), "tensors": found.counts("tensor")},
        "entries": [_entry_json(entry, id(entry) in names) for entry in found.entries],
        "metadata": [_setting_json(setting) for setting in found.metadata],
        "config": [_setting_json(setting) for setting in found.config],
        "notes": list(found.notes),
    }


def _side_json(side: SideFacts) -> dict[str, Any]:
    return {
        "path": str(side.path),
        "files": side.files,
        "bytes": side.nbytes,
        "recipe": side.recipe,
        "parts": [
            {"name": part.name, "location": part.location, "layout": part.layout}
            for part in side.parts
        ],
    }


def _entry_json(entry: Compared, failed: bool) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "part": entry.part,
        "name": entry.name,
        "verdict": entry.verdict,
        "failed": failed,
        "details": list(entry.details),
        "rounding": entry.rounding,
        "distance": None if entry.distance is None else _distance_json(entry.distance),
        "a": None if entry.a is None else _stored_json(entry.a),
        "b": None if entry.b is None else _stored_json(entry.b),
    }


def _distance_json(distance: Distance) -> dict[str, Any]:
    sqnr = distance.sqnr_db
    return {
        "exact": distance.exact,
        "finite": distance.finite,
        # JSON has no infinity: that of numbers that are not zero where all of A's are.
        "sqnr_db": sqnr if sqnr is not None and math.isfinite(sqnr) else None,
        "worst_error": distance.worst_error,
        "at": None if distance.at is None else list(distance.at),
        "in_scales": distance.in_scales,
    }


def _stored_json(stored: Stored) -> dict[str, Any]:
    return {
        "part": stored.part,
        "name": stored.name,
        "shape": list(stored.shape),
        "weight": None
        if stored.weight is None
        else stored.weight.model_dump(mode="json", exclude={"quantizer"}),
        "tensors": {
            role: {
                "name": info.name,
                "dtype": info.dtype,
                "shape": list(info.shape),
                "file": info.file.name,
            }
            for role, info in stored.tensors.items()
        },
    }


def _setting_json(setting: Setting) -> dict[str, Any]:
    return {"where": setting.where, "key": setting.key, "a": setting.a, "b": setting.b}
