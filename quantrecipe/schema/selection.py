"""Which entry of a recipe takes which module, and what does not hold about that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from quantrecipe.schema.dtypes import is_plain
from quantrecipe.schema.layout_reading import PartContents
from quantrecipe.schema.patterns import Patterns, check_pattern, is_exact
from quantrecipe.schema.problems import Problem, closest
from quantrecipe.schema.recipe import CountRange, Protected, Recipe, Rule
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.tensors import TensorInfo

EMBEDDING_NAMES = Patterns.compile(
    [
        "**.{*embedding,*embeddings,*_embeds,embed,embed_*,*_embed,wte,wpe,shared}",
        "**.relative_attention_bias",
    ]
)


# Comparing names takes seconds beyond that.
_MOST_COMPARED: Final = 20_000


@dataclass(frozen=True, slots=True)
class Taken:
    """The entry that took a module: exactly one of ``rule`` and ``protected`` is set."""

    pointer: str
    pattern: str
    rule: Rule | None = None
    protected: Protected | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Who took what.

    Attributes:
        taken: by part and module; a module that is missing passes through.
        problems: entries that take nothing, counts that do not hold, embeddings taken by wildcard.
    """

    taken: Mapping[tuple[str, str], Taken]
    problems: tuple[Problem, ...]


@dataclass(slots=True)
class _Entry:
    pointer: str
    entry: Rule | Protected
    patterns: Patterns
    taken: int = 0
    used: set[int] = field(default_factory=set)

    def taken_by(self, pattern: int) -> Taken:
        text = self.entry.modules[pattern]
        if isinstance(self.entry, Rule):
            return Taken(self.pointer, text, rule=self.entry)
        return Taken(self.pointer, text, protected=self.entry)

    def holds_for(self, part: str) -> bool:
        return self.entry.parts is None or part in self.entry.parts


def select(recipe: Recipe, contents: Mapping[str, PartContents]) -> Selection:
    """Give every module to the first entry that matches it: protected ones first, then rules."""
    entries = [
        _Entry(f"/protected/{index}", entry, Patterns.compile(entry.modules))
        for index, entry in enumerate(recipe.protected)
    ] + [
        _Entry(f"/rules/{index}", rule, Patterns.compile(rule.modules))
        for index, rule in enumerate(recipe.rules)
    ]
    taken: dict[tuple[str, str], Taken] = {}
    problems: list[Problem] = []
    for part, found in contents.items():
        for name in module_names(found):
            for entry in entries:
                pattern = entry.patterns.matches(name) if entry.holds_for(part) else None
                if pattern is None:
                    continue
                entry.taken += 1
                entry.used.add(pattern)
                taken[part, name] = entry.taken_by(pattern)
                if _quantizes(recipe, entry.entry):
                    problems += _embedding(name, entry, pattern)
                break
    for entry in entries:
        problems += _check_entry(entry, contents, taken)
    return Selection(taken, tuple(problems))


def module_names(found: PartContents) -> list[str]:
    """The modules of a part, in the order of their names.

    What is broken counts as well: the checkpoint is at fault there, not the patterns.
    """
    return sorted(found.modules.keys() | found.broken)


def _quantizes(recipe: Recipe, entry: Rule | Protected) -> bool:
    if isinstance(entry, Protected):
        return False
    scheme = recipe.schemes.get(entry.scheme)
    return scheme is None or isinstance(scheme.weight, ScaledWeight)


def _embedding(name: str, entry: _Entry, pattern: int) -> Iterator[Problem]:
    """A header cannot tell an embedding table from a linear, so a wildcard may not take one."""
    text = entry.entry.modules[pattern]
    if EMBEDDING_NAMES.matches(name) is not None and not is_exact(text):
        yield Problem(
            "embedding",
            f"pattern {text!r} takes {name!r}, which by its name is an embedding table: looked up "
            "by row, not multiplied",
            hint="Protect it, or name it without wildcards if it really is to be quantized.",
            pointer=f"{entry.pointer}/modules/{pattern}",
            tensor=name,
        )


def _check_entry(
    entry: _Entry,
    contents: Mapping[str, PartContents],
    taken: Mapping[tuple[str, str], Taken],
) -> Iterator[Problem]:
    count = entry.entry.count
    least = count.min if isinstance(count, CountRange) else 1
    if least > 0:
        for index, text in enumerate(entry.entry.modules):
            yield from _dead_pattern(entry, index, text, contents, taken)
    if isinstance(count, int) and entry.taken != count:
        yield Problem(
            "count",
            f"takes {entry.taken} module(s), not {count}",
            hint="Mend the patterns, or the count if the model has changed.",
            pointer=f"{entry.pointer}/count",
        )
    if isinstance(count, CountRange) and (
        entry.taken < count.min or (count.max is not None and entry.taken > count.max)
    ):
        most = "any number" if count.max is None else count.max
        yield Problem(
            "count",
            f"takes {entry.taken} module(s), not {count.min} to {most}",
            hint="Mend the patterns, or the count if the model has changed.",
            pointer=f"{entry.pointer}/count",
        )


def _dead_pattern(
    entry: _Entry,
    index: int,
    text: str,
    contents: Mapping[str, PartContents],
    taken: Mapping[tuple[str, str], Taken],
) -> Iterator[Problem]:
    """A pattern that takes nothing is a typo until the recipe says otherwise."""
    if index in entry.used:
        return
    alone = Patterns.compile([text])
    earlier: dict[str, int] = {}
    for part, found in contents.items():
        if not entry.holds_for(part):
            continue
        for name in module_names(found):
            owner = taken.get((part, name))
            if owner is None or alone.matches(name) is None:
                continue
            own = owner.pointer == entry.pointer
            where = f"an earlier pattern of {entry.pointer}" if own else owner.pointer
            earlier[where] = earlier.get(where, 0) + 1
    message = f"pattern {text!r} takes no module"
    if earlier:
        takers = " and ".join(sorted(earlier))
        message += f": all {sum(earlier.values())} it matches were taken by {takers}"
        hint = "Take the pattern out, or make the earlier ones take less."
    else:
        hint = _near_miss(entry, text, alone, contents)
    yield Problem("takes-nothing", message, hint=hint, pointer=f"{entry.pointer}/modules/{index}")


def _near_miss(
    entry: _Entry, text: str, alone: Patterns, contents: Mapping[str, PartContents]
) -> str:
    modules: set[str] = set()
    for part, found in contents.items():
        names = module_names(found)
        if not entry.holds_for(part):
            elsewhere = next((name for name in names if alone.matches(name) is not None), None)
            if elsewhere is not None:
                return f"It matches {elsewhere!r} of part {part!r}, which the entry leaves out."
            continue
        modules.update(names)
        hint = _elsewise(alone, found)
        if hint is not None:
            return hint
    for name in sorted(modules):
        if alone.matches(f"{name}.weight") is not None:
            return f"Patterns match modules, not tensors: {name!r}, without '.weight'."
    wider = ".".join("**" if segment == "*" else segment for segment in text.split("."))
    if wider != text and _matches_any(wider, modules):
        return f"'*' stands for one segment of a name: did you mean {wider!r}?"
    near = closest(text, modules) if len(modules) <= _MOST_COMPARED else None
    if near is not None:
        return f"Did you mean {near!r}?"
    if not modules:
        return "There are no modules."
    return f"Modules are called like {min(modules)!r}."


def _elsewise(alone: Patterns, found: PartContents) -> str | None:
    """What a pattern matches in a part that is called otherwise there, or is no module."""
    for name, into in found.renamed.items():
        if alone.matches(name) is not None:
            return (
                f"target.names calls {name!r} {' and '.join(map(repr, into))}, and patterns speak "
                "of the new names."
            )
    for name, info in found.others.items():
        stem = name.removesuffix(".weight")
        if alone.matches(stem) is not None:
            return f"It matches {stem!r}, but {_no_module(name, info)}."
    return None


def _matches_any(text: str, names: Iterable[str]) -> bool:
    if check_pattern(text) is not None:
        return False
    alone = Patterns.compile([text])
    return any(alone.matches(name) is not None for name in names)


def _no_module(name: str, info: TensorInfo) -> str:
    """Why a tensor is not the weight of a module."""
    if len(info.shape) != 2:
        return (
            f"that has shape {list(info.shape)}: only two-dimensional weights are modules, "
            "everything else passes through"
        )
    if is_plain(info.dtype):
        return (
            f"{name!r} is stored [in, out], as its bias shows, and modules are [out, in]: it "
            "passes through"
        )
    return f"{name!r} is {info.dtype}, which the source's layout has no module for"
