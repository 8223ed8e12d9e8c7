"""Siblings: modules that have the same input, and so share their smoothing factors.

What divides an input stands once before all that read it. So the factors of a group are of the
largest weights of all its members, and each stores the same ones. A sibling that no scheme smooths
(it is protected, or passes through) is none of them: where every module divides its own input, it
reads the input as it is, and its weight neither changes nor counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from quantrecipe.schema.folds import FoldSite
from quantrecipe.schema.plan import PlannedModule, SmoothingGroup
from quantrecipe.schema.problems import Problem, closest
from quantrecipe.schema.renaming import captured
from quantrecipe.schema.schemes import ScaledWeight, SmoothQuant

_MOST_COMPARED = 20_000


@dataclass(frozen=True, slots=True)
class Siblings:
    """Modules of one part that have the same input.

    Attributes:
        part: whose.
        modules: their names, sorted; two at least.
        pointer: the list of the recipe that ties them; ``None`` if they were found otherwise.
    """

    part: str
    modules: tuple[str, ...]
    pointer: str | None = None


@dataclass(frozen=True, slots=True)
class Ties:
    """What the lists of a recipe tie.

    Attributes:
        siblings: in the order of the lists.
        problems: names that fit nothing, lists that tie nothing, modules that are tied twice.
    """

    siblings: tuple[Siblings, ...]
    problems: tuple[Problem, ...]


class Smoothed(Protocol):
    """A module of a plan or a lock."""

    @property
    def part(self) -> str:
        """Whose."""

    @property
    def name(self) -> str:
        """Dotted."""

    @property
    def smoothing(self) -> SmoothQuant | None:
        """As its scheme says; ``None`` if it is not smoothed."""


def tie(lists: Sequence[Sequence[str]], names: Mapping[str, Iterable[str]]) -> Ties:
    """Tie the modules of each part whose names fit the patterns of one list with the same ``*``.

    Args:
        lists: ``siblings`` of a recipe.
        names: the modules of each part.
    """
    found: list[Siblings] = []
    problems: list[Problem] = []
    owners: dict[tuple[str, str], Siblings] = {}
    for index, patterns in enumerate(lists):
        pointer = f"/siblings/{index}"
        alike, used = _alike(patterns, names)
        mine = [
            Siblings(part, tuple(sorted(members)), pointer)
            for (part, *_), members in alike.items()
            if len(members) > 1
        ]
        found += mine
        unused = [place for place in range(len(patterns)) if place not in used]
        problems += [_fits_nothing(patterns[at], f"{pointer}/{at}", names) for at in unused]
        if not unused and not mine:
            problems.append(
                Problem(
                    "ties-nothing",
                    "no two modules fit it with the same '*'",
                    hint="The first '*' of each name stands for the same, the second likewise.",
                    pointer=pointer,
                )
            )
        twice = [
            f"{name!r} of part {group.part!r}"
            for group in mine
            for name in group.modules
            if owners.setdefault((group.part, name), group) is not group
        ]
        if twice:
            more = f" and {len(twice) - 1:,} more" if len(twice) > 1 else ""
            problems.append(
                Problem(
                    "tied-twice",
                    f"ties {twice[0]}{more}, tied to others already",
                    hint="Put all that have the same input into one list.",
                    pointer=pointer,
                )
            )
    return Ties(tuple(found), tuple(problems))


def _alike(
    patterns: Sequence[str], names: Mapping[str, Iterable[str]]
) -> tuple[Mapping[tuple[str, ...], set[str]], set[int]]:
    """Modules by part and what the ``*`` stand for, and which of the patterns any fits."""
    wanted = [pattern.split(".") for pattern in patterns]
    found: dict[tuple[str, ...], set[str]] = {}
    used: set[int] = set()
    for part, modules in names.items():
        for name in modules:
            segments = name.split(".")
            for place, pattern in enumerate(wanted):
                stars = captured(pattern, segments)
                if stars is not None:
                    used.add(place)
                    found.setdefault((part, *stars), set()).add(name)
    return found, used


def _fits_nothing(pattern: str, pointer: str, names: Mapping[str, Iterable[str]]) -> Problem:
    known = sorted({name for of in names.values() for name in of})
    near = closest(pattern, known) if len(known) <= _MOST_COMPARED else None
    hint = f"Did you mean {near!r}?" if near is not None else None
    return Problem("takes-nothing", f"no module fits {pattern!r}", hint=hint, pointer=pointer)


def differing(ties: Iterable[Siblings], modules: Iterable[PlannedModule]) -> Iterator[Problem]:
    """Siblings that cannot share factors: each list of the recipe once.

    All have as many input features. Those that a recipe ties are smoothed alike, as far as they are
    quantized; those that were found share factors with whom they are smoothed alike.
    """
    known = {(module.part, module.name): module for module in modules}
    told: set[str | None] = set()
    for group in ties:
        members = [known[group.part, name] for name in group.modules if (group.part, name) in known]
        quantized = [member for member in members if _is_quantized(member)]
        pairs = [(members[0], member, _other_inputs) for member in members]
        if group.pointer is not None:
            pairs += [(quantized[0], member, _other_smoothing) for member in quantized]
        for first, other, difference in pairs:
            message = difference(first, other)
            if message is not None and group.pointer not in told:
                told.add(group.pointer)
                yield Problem(
                    "siblings-differ",
                    f"{first.name!r} and {other.name!r} of part {group.part!r} {message}",
                    hint="Take one out of the list, or give both schemes the same smoothing."
                    if group.pointer is not None
                    else "The statistics are not of this model: measure again.",
                    pointer=group.pointer,
                )


def _is_quantized(module: PlannedModule) -> bool:
    return module.disposition == "quantized" and isinstance(module.weight, ScaledWeight)


def _other_inputs(first: PlannedModule, other: PlannedModule) -> str | None:
    features = first.source.in_features, other.source.in_features
    if features[0] == features[1]:
        return None
    return f"have {features[0]} and {features[1]} input features: their inputs differ"


def _other_smoothing(first: PlannedModule, other: PlannedModule) -> str | None:
    if first.smoothing == other.smoothing:
        return None
    return f"are smoothed differently, by schemes {first.scheme!r} and {other.scheme!r}"


def folded(sites: Iterable[FoldSite]) -> Iterator[Siblings]:
    """Whatever has its input divided in one place; these come before other ties."""
    for site in sites:
        yield Siblings(site.part, site.modules, f"/folds/{site.edge}")


def smoothing_groups(
    modules: Iterable[Smoothed], ties: Iterable[Siblings]
) -> tuple[SmoothingGroup, ...]:
    """Every smoothed module in one group: with its siblings of the same smoothing, or alone.

    Args:
        modules: all of them.
        ties: who has the same input as whom; names that no module has count for nothing.
    """
    known = {(module.part, module.name): module for module in modules}
    alone = {key for key, module in known.items() if module.smoothing is not None}
    found: list[SmoothingGroup] = []
    for siblings in ties:
        part = siblings.part
        members = [known[part, name] for name in siblings.modules if (part, name) in known]
        plain = tuple(member.name for member in members if member.smoothing is None)
        by_smoothing: dict[SmoothQuant, list[str]] = {}
        for member in members:
            if member.smoothing is not None and (part, member.name) in alone:
                alone.remove((part, member.name))
                by_smoothing.setdefault(member.smoothing, []).append(member.name)
        found += [
            SmoothingGroup(part, tuple(sorted(names)), plain, smoothing)
            for smoothing, names in by_smoothing.items()
        ]
    for part, name in alone:
        smoothing = known[part, name].smoothing
        assert smoothing is not None
        found.append(SmoothingGroup(part, (name,), (), smoothing))
    return tuple(sorted(found, key=lambda group: (group.part, group.modules)))
