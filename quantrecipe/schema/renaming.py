"""A source under the names of a target: modules renamed, split and merged by rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from quantrecipe.schema.layout_reading import PartContents, StoredModule
from quantrecipe.schema.merging import merge
from quantrecipe.schema.names import NameMapping
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.slicing import split, unsplittable
from quantrecipe.schema.tensors import TensorInfo


def renamed(contents: PartContents, names: Sequence[NameMapping]) -> PartContents:
    """A part of a source, with its modules and other tensors called as in a target.

    Args:
        contents: the part, read through the layout that it is in.
        names: the entries that ``target.names`` of a recipe stands for; without any, nothing
            changes.

    Returns:
        The part. A module that is split is there as its slices, each with the offsets and shapes of
        its rows; modules that are merged are there as one, whose tensors lie in several places.
        What cannot be split or merged, and names that two would go by, are problems.
    """
    return _Renaming(contents, names).run() if names else contents


def new_names(name: str, names: Sequence[NameMapping]) -> tuple[str, ...]:
    """What a module, or its slices, or what it is merged into, is called; nothing, if no other."""
    found = _entry(name, names)
    return () if found is None else found.targets


@dataclass(frozen=True, slots=True)
class _Entry:
    """The entry that is for a name.

    Attributes:
        index: which.
        sources, targets: its names, filled in.
        place: which of ``sources`` it is.
    """

    index: int
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    place: int


def _entry(name: str, names: Sequence[NameMapping]) -> _Entry | None:
    segments = name.split(".")
    for index, mapping in enumerate(names):
        for place, source in enumerate(mapping.sources):
            stars = captured(source.split("."), segments)
            if stars is not None:
                sources, targets = (
                    tuple(filled(each, stars) for each in side)
                    for side in (mapping.sources, mapping.targets)
                )
                return _Entry(index, sources, targets, place)
    return None


@dataclass(slots=True)
class _Gathered:
    """Modules that are to be one, by their place in its rows."""

    entry: _Entry
    pieces: dict[int, StoredModule] = field(default_factory=dict)


class _Renaming:
    def __init__(self, contents: PartContents, names: Sequence[NameMapping]) -> None:
        self.contents = contents
        self.names = names
        self.modules: dict[str, StoredModule] = {}
        self.merging: dict[tuple[int, tuple[str, ...]], _Gathered] = {}
        self.renamed: dict[str, tuple[str, ...]] = {}
        self.problems: list[Problem] = list(contents.problems)
        self.broken = {new for name in contents.broken for new in new_names(name, names) or (name,)}

    def run(self) -> PartContents:
        for module in self.contents.modules.values():
            self._take(module)
        for gathered in self.merging.values():
            self._merge(gathered)
        others: dict[str, TensorInfo] = {}
        for name, info in self.contents.others.items():
            new = self._other(name, info)
            if others.setdefault(new, info) is not info:
                self._conflict(new, (others[new].name, name), info)
        return replace(
            self.contents,
            modules=dict(sorted(self.modules.items())),
            others=dict(sorted(others.items())),
            problems=tuple(self.problems),
            broken=frozenset(self.broken - self.modules.keys()),
            renamed=self.renamed,
        )

    def _take(self, module: StoredModule) -> None:
        """A module of the source: renamed, split, or kept until all that it is merged with is."""
        entry = self._found(module.name)
        if entry is None:
            self._add(module)
        elif len(entry.sources) > 1:
            key = entry.index, entry.sources
            self.merging.setdefault(key, _Gathered(entry)).pieces[entry.place] = module
        else:
            reason = unsplittable(module, len(entry.targets))
            if reason is None:
                for piece in split(module, entry.targets):
                    self._add(piece)
            else:
                self._refuse(entry, reason, module.tensors["weight"])
                self.broken.update(entry.targets)

    def _merge(self, gathered: _Gathered) -> None:
        entry, (target,) = gathered.entry, gathered.entry.targets
        pieces = [gathered.pieces[place] for place in sorted(gathered.pieces)]
        missing = [name for name in entry.sources if name not in {p.name for p in pieces}]
        if target in self.broken:
            return  # A piece has a problem of its own.
        weight = pieces[0].tensors["weight"]
        if missing:
            lacking = " and no ".join(map(repr, missing))
            hint = "Get the whole checkpoint, or leave the entry out of the names."
            self._refuse(entry, f"the source has no {lacking}", weight, hint)
        else:
            merged = merge(target, pieces)
            if isinstance(merged, StoredModule):
                self._add(merged)
                return
            self._refuse(entry, merged.reason, weight, merged.hint)
        self.broken.add(target)

    def _add(self, module: StoredModule) -> None:
        other = self.modules.setdefault(module.name, module)
        if other is not module:
            owners = [(each.renamed_from or (each.name,))[0] for each in (other, module)]
            self._conflict(module.name, owners, module.tensors["weight"])

    def _found(self, name: str) -> _Entry | None:
        """The entry for a name; none, where it would change nothing."""
        entry = _entry(name, self.names)
        if entry is None or entry.sources == entry.targets:
            return None
        self.renamed[name] = entry.targets
        return entry

    def _other(self, name: str, info: TensorInfo) -> str:
        """The name of a tensor of no module: renamed as a whole, or as the owner it names."""
        owner, _, own = name.rpartition(".")
        for stem, rest in ((name, ""), (owner, f".{own}")):
            entry = self._found(stem)
            if entry is None:
                continue
            if len(entry.sources) == len(entry.targets):
                return entry.targets[0] + rest
            self._refuse(entry, f"{info.name!r} is not a module's", info)
        return name

    def _refuse(
        self, entry: _Entry, reason: str, info: TensorInfo, hint: str | None = None
    ) -> None:
        sources, targets = (" and ".join(map(repr, x)) for x in (entry.sources, entry.targets))
        merged = len(entry.sources) > 1
        self.problems.append(
            Problem(
                "cannot-merge" if merged else "cannot-split",
                f"target.names {'merges' if merged else 'splits'} {sources} into {targets}, and "
                f"{reason}",
                hint=hint or "Convert without these names, or from another source.",
                file=str(info.file),
                tensor=info.name,
                pointer="/target/names",
            )
        )

    def _conflict(self, name: str, owners: Sequence[str], info: TensorInfo) -> None:
        self.problems.append(
            Problem(
                "name-conflict",
                f"{owners[0]!r} and {owners[1]!r} would both be called {name!r}",
                hint="The source has it under both names; one of them is left over, or "
                "target.names is not for this model.",
                file=str(info.file),
                tensor=info.name,
                pointer="/target/names",
            )
        )


def captured(pattern: Sequence[str], segments: Sequence[str]) -> list[str] | None:
    """What each ``*`` stands for, or ``None`` where the name does not fit.

    Args:
        pattern: the segments of a name, in which ``*`` stands for any one segment.
        segments: those of the name.
    """
    if len(pattern) != len(segments):
        return None
    found = []
    for wanted, segment in zip(pattern, segments, strict=True):
        if wanted == "*":
            found.append(segment)
        elif wanted != segment:
            return None
    return found


def filled(template: str, stars: Sequence[str]) -> str:
    """A name in which each ``*`` is what was captured for it."""
    values = iter(stars)
    return ".".join(next(values) if each == "*" else each for each in template.split("."))
