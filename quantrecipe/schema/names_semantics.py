"""What names say that no schema can check: whether their entries fit one another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantrecipe.schema.problems import Problem


def names_problems(names: Any, pointer: str) -> Iterator[Problem]:
    """Names that cannot be made, or that two entries would take or make.

    Args:
        names: the list of entries as a JSON value; what is not of the expected shape is looked
            past.
        pointer: where the list is in its document.
    """
    taken: dict[str, str] = {}
    made: dict[str, str] = {}
    for index, entry in enumerate(names if isinstance(names, list) else ()):
        if not isinstance(entry, dict):
            continue
        here = f"{pointer}/{index}"
        sources = list(_each(entry.get("from"), f"{here}/from"))
        targets = list(_each(entry.get("into"), f"{here}/into"))
        if len(sources) > 1 and len(targets) > 1:
            yield Problem(
                "many-to-many",
                "an entry merges several modules or splits one, not both",
                "Name one module in 'from' or in 'into'; two conversions can do one after the "
                "other.",
                pointer=here,
            )
        yield from _wildcards([*sources, *targets])
        for where, name in sources:
            if name in taken:
                yield Problem(
                    "duplicate-name",
                    f"{name!r} is what {taken[name]} is for already",
                    "The first entry that fits counts; take one of them out.",
                    pointer=where,
                )
            taken.setdefault(name, here)
        for where, name in targets:
            if name in made:
                yield Problem(
                    "duplicate-name",
                    f"{name!r} is already the name that {made[name]} makes",
                    "Every module goes by a name of its own.",
                    pointer=where,
                )
            made.setdefault(name, where)


def _each(said: Any, pointer: str) -> Iterator[tuple[str, str]]:
    """The names on one side of an entry, each with its place."""
    if isinstance(said, str):
        yield pointer, said
    for place, name in enumerate(said if isinstance(said, list) else ()):
        if isinstance(name, str):
            yield f"{pointer}/{place}", name


def _wildcards(names: list[tuple[str, str]]) -> Iterator[Problem]:
    """Every name of an entry has as many as its first: each is carried over to the others."""
    for where, name in names[1:]:
        if name.split(".").count("*") != names[0][1].split(".").count("*"):
            yield Problem(
                "wildcards-differ",
                f"{name!r} has not as many '*' as {names[0][1]!r}",
                "What each '*' stands for is carried over to the one in the same place.",
                pointer=where,
            )
