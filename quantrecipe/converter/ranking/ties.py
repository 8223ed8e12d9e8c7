"""What is protected together: modules with one input, and one module of several branches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from quantrecipe.converter.ranking.results import Fragility, Group, Key


def grouped(modules: Sequence[Fragility], families: Iterable[Sequence[Key]]) -> tuple[Group, ...]:
    """Groups of modules, the noisiest first; families that share a module become one group.

    Args:
        modules: what was ranked.
        families: part and name of modules that belong together; those not ranked are left out.
    """
    known = {module.key: module for module in modules}
    leader = {key: key for key in known}

    def find(key: Key) -> Key:
        while leader[key] != key:
            key = leader[key]
        return key

    for family in families:
        here = [find(key) for key in family if key in known]
        for key in here[1:]:
            leader[find(key)] = find(here[0])
    members: dict[Key, list[Fragility]] = {}
    for key in sorted(known):
        members.setdefault(find(key), []).append(known[key])
    found = [
        Group(
            tuple(each.key for each in group),
            math.fsum(each.noise for each in group),
            sum(each.extra_bytes for each in group),
        )
        for group in members.values()
    ]
    return tuple(sorted(found, key=lambda group: (-group.noise, group.modules)))


def across_parts(modules: Iterable[Fragility]) -> list[list[Key]]:
    """Modules of the same name in several parts."""
    by_name: dict[str, list[Key]] = {}
    for module in modules:
        by_name.setdefault(module.name, []).append(module.key)
    return list(by_name.values())
