"""The fewest and shortest patterns that take some modules of a checkpoint and no others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from quantrecipe.schema.name_groups import collapse, natural, starred
from quantrecipe.schema.patterns import Patterns, check_pattern

# The planner lets no wildcard take these.
from quantrecipe.schema.selection import EMBEDDING_NAMES


def short_patterns(names: Collection[str], others: Iterable[str]) -> list[str]:
    """Patterns that take every one of ``names`` and none of ``others``.

    The shortest beginning of a name behind which nothing else lies, with ``**`` after it; numbers
    in it are ``*``. Where there is none, the name with ``*`` for its numbers, and else names whose
    numbers run on, as ``collapse`` writes them. Names of embedding tables are written out.

    Args:
        names: of modules, dotted; at least one.
        others: names of modules that are to be left alone.

    Returns:
        In the order of the first name that each takes; the same for the same names.
    """
    tables = sorted((name for name in names if _is_table(name)), key=natural)
    wanted = [name for name in names if not _is_table(name)]
    alone = list({*others, *tables})
    found: dict[str, str] = {}
    left: list[str] = []
    for name in sorted(wanted, key=natural):
        pattern = next((each for each in _wider(name) if _takes_none(each, alone, found)), None)
        if pattern is None:
            left.append(name)
        else:
            found.setdefault(pattern, name)
    found = _no_wider_than_needed(found, wanted)
    for group in collapse(left):
        found[group.pattern] = group.names[0]
    found |= {group.pattern: name for name in tables for group in collapse([name])}
    ordered = sorted(found, key=lambda pattern: natural(found[pattern]))
    compiled = Patterns.compile(ordered)
    # One that starts with a number may take what another does as well.
    used = {compiled.matches(name) for name in names}
    return [pattern for place, pattern in enumerate(ordered) if place in used]


def _no_wider_than_needed(found: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    """The same patterns; one that takes names that differ in numbers alone says them all."""
    forms: dict[str, set[str]] = {pattern: set() for pattern in found}
    patterns = list(found)
    compiled = Patterns.compile(patterns)
    for name in names:
        taken = compiled.matches(name)
        if taken is not None:
            forms[patterns[taken]].add(starred(name))
    return {
        forms[pattern].pop() if len(forms[pattern]) == 1 else pattern: name
        for pattern, name in found.items()
    }


def _is_table(name: str) -> bool:
    return EMBEDDING_NAMES.matches(name) is not None


def _wider(name: str) -> Iterator[str]:
    """Patterns that take a name, from those that take the most."""
    segments = name.split(".")
    literal = [segment for segment in segments if not segment.isdecimal()]
    if any(set("*{}") & set(segment) for segment in literal) or name.startswith("re:"):
        return
    stars = starred(name).split(".")
    for length in range(len(segments)):
        yield ".".join([*stars[:length], "**"])
    yield ".".join(stars)


def _takes_none(pattern: str, others: Iterable[str], known: Collection[str]) -> bool:
    if pattern in known:
        return True
    if check_pattern(pattern) is not None:
        return False
    compiled = Patterns.compile([pattern])
    return all(compiled.matches(name) is None for name in others)
