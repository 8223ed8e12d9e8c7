"""Which part goes with which, and under which names both have the same modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from quantrecipe.evaluate.comparison.sides import OpenedPart, Side
from quantrecipe.schema.layout_reading import PartContents
from quantrecipe.schema.names import NameMapping
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean
from quantrecipe.schema.registry import NAMES, named_names
from quantrecipe.schema.renaming import new_names, renamed


@dataclass(frozen=True, slots=True)
class Pair:
    """Two parts, with modules called by the same names where that can be done.

    Attributes:
        a, b: the parts; ``None``: that checkpoint has no such part.
        names_of: the names that made more of them the same.
        notes: what could not be called so.
    """

    a: OpenedPart | None
    b: OpenedPart | None
    names_of: str | None = None
    notes: tuple[str, ...] = ()


def pair_parts(a: Side, b: Side, given: Mapping[str, str]) -> list[Pair]:
    """Every part of both: together as the caller says, by name, by folder, or as the only ones.

    Args:
        a: a checkpoint.
        b: another one.
        given: A's name of a part to B's.

    Raises:
        InvalidInput: there is no such part, or one is given twice.
    """
    problems = [*_unknown(a, given), *_unknown(b, given.values())]
    twice = [name for name in dict.fromkeys(given.values()) if [*given.values()].count(name) > 1]
    problems += [
        Problem("unknown-part", f"part {name!r} is given two parts to be compared with")
        for name in twice
    ]
    if problems:
        raise InvalidInput(problems)
    names = _belonging(a, b, given)
    taken = set(names.values())
    known = _known_names(a, b)
    pairs = [
        _named_alike(part, b.parts[names[name]], known) if name in names else Pair(part, None)
        for name, part in a.parts.items()
    ]
    return pairs + [Pair(None, part) for name, part in b.parts.items() if name not in taken]


def _belonging(a: Side, b: Side, given: Mapping[str, str]) -> dict[str, str]:
    """A's name of a part to B's."""
    if len(a.parts) == len(b.parts) == 1:
        return {next(iter(a.parts)): next(iter(b.parts))}
    names = dict(given)
    ours = [name for name in a.parts if name not in names]
    theirs = [name for name in b.parts if name not in names.values()]
    names |= {name: name for name in ours if name in theirs}
    # A recipe says what the folders of its source and of its target are to it.
    homes = {name: _homes(a, name) for name in ours if name not in names}
    others = {name: _homes(b, name) for name in theirs if name not in names.values()}
    for name, folders in homes.items():
        found = [other for other, where in others.items() if folders & where]
        if len(found) == 1:
            rivals = [each for each, where in homes.items() if where & others[found[0]]]
            names |= {name: found[0]} if rivals == [name] else {}
    return names


def _homes(side: Side, name: str) -> frozenset[PurePosixPath]:
    """The folders that a part lies in, or came from; none for the root, where any part may be."""
    places = [side.parts[name].location]
    if side.recipe is not None and name in side.recipe.source.parts:
        places += [side.recipe.source.parts[name], side.recipe.target.file_of(name)]
    paths = [PurePosixPath(place) for place in places]
    folders = (path.parent if path.suffix else path for path in paths)
    return frozenset(folder for folder in folders if folder.parts)


def _unknown(side: Side, names: Iterable[str]) -> Iterator[Problem]:
    for name in names:
        if name not in side.parts:
            yield Problem(
                "unknown-part",
                f"there is no part {name!r}",
                hint=did_you_mean(name, list(side.parts)),
                file=str(side.path),
            )


Entries = Sequence[NameMapping]


def _known_names(a: Side, b: Side) -> dict[str, Entries]:
    """What modules may be called elsewhere: known names, and those of the recipes."""
    found: dict[str, Entries] = {name: named_names(name).names for name in NAMES}
    for side in (a, b):
        if side.recipe is not None and not isinstance(side.recipe.target.names, str | None):
            found[f"of recipe {side.recipe.name}"] = side.recipe.target.names
    return found


def _named_alike(a: OpenedPart, b: OpenedPart, known: Mapping[str, Entries]) -> Pair:
    """The parts, by those names that leave the fewest modules without a partner."""
    best = Pair(a, b)
    fewest = _alone(a.contents, b.contents)
    for name, entries in known.items():
        if not fewest:
            break
        ours, left = _called_by(a.contents, entries)
        theirs, also_left = _called_by(b.contents, entries)
        alone = _alone(ours, theirs)
        if alone < fewest:
            fewest = alone
            notes = (*left, *also_left)
            best = Pair(replace(a, contents=ours), replace(b, contents=theirs), name, notes)
    return best


def _alone(a: PartContents, b: PartContents) -> int:
    modules = len(a.modules.keys() ^ b.modules.keys())
    return modules + len(a.others.keys() ^ b.others.keys())


def _called_by(contents: PartContents, names: Entries) -> tuple[PartContents, tuple[str, ...]]:
    """A part with other names, and why modules keep theirs that do."""
    found = renamed(contents, names)
    problems = [problem for problem in found.problems if problem not in contents.problems]
    if any(problem.kind == "name-conflict" for problem in problems):
        return contents, ()
    kept = {
        name: module
        for name, module in contents.modules.items()
        if any(new not in found.modules for new in new_names(name, names))
    }
    reasons = tuple(problem.message for problem in problems)
    return replace(found, modules={**found.modules, **kept}), reasons
