"""A recipe with more modules protected: by exact name, each with the figures that speak for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quantrecipe.converter.planning import OpenRecipe
from quantrecipe.converter.ranking.results import Fragility, Group, Key, Ranking, decibels
from quantrecipe.schema.canonical import document_bytes
from quantrecipe.schema.patterns import REGEX_PREFIX, check_pattern, is_exact
from quantrecipe.schema.plan import Plan, PlannedModule
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.validation import parse_recipe

_Json = dict[str, Any]


def protect(
    recipe: OpenRecipe, planned: Plan, ranking: Ranking, chosen: Iterable[Group]
) -> OpenRecipe:
    """The recipe, with the modules of ``chosen`` protected.

    What it says already stays. Rules count the modules that they take, so their counts are brought
    to what is left to them; patterns, rules and schemes that nothing is left to are taken out.

    Args:
        recipe: what ``planned`` is the plan of.
        planned: from the same source that was ranked.
        ranking: of ``planned``.
        chosen: groups of ``ranking``.

    Raises:
        InvalidInput: the result does not hold to the schema.
    """
    groups = tuple(chosen)
    value = recipe.recipe.to_json_value()
    if groups:
        taken = frozenset(key for group in groups for key in group.modules)
        value["protected"] = [*value.get("protected", ()), *entries(ranking, groups)]
        _relieve(value, recipe.recipe, planned, taken)
    return OpenRecipe(parse_recipe(document_bytes(value), recipe.recipe.name), recipe.folder)


def entries(ranking: Ranking, groups: Iterable[Group]) -> list[_Json]:
    """Protected entries, in the order of the ranking; modules with the same reason share one."""
    places = {module.key: place for place, module in enumerate(ranking.modules, start=1)}
    keys = [key for group in groups for key in group.modules]
    found: dict[tuple[str, str], list[str]] = {}
    for key in sorted(keys, key=places.__getitem__):
        reason = reason_for(ranking, ranking.module(key), places[key])
        found.setdefault((key[0], reason), []).append(key[1])
    return [
        {
            "modules": [exact_pattern(name) for name in names],
            "parts": [part],
            "dtype": ranking.dtype,
            "count": len(names),
            "reason": reason,
        }
        for (part, reason), names in found.items()
    ]


def exact_pattern(name: str) -> str:
    """A pattern that matches this name and no other."""
    plain = is_exact(name) and check_pattern(name) is None
    return name if plain else f"{REGEX_PREFIX}{re.escape(name)}"


_KNOWN_FROM: Mapping[str, str] = {
    "moments": "predicted from input moments",
    "weight": "of the weight alone",
}


def reason_for(ranking: Ranking, module: Fragility, place: int) -> str:
    """What speaks for protecting a module, in figures."""
    how = _KNOWN_FROM.get(module.basis) or f"measured on {module.tokens} tokens"
    figures = [f"SQNR {_db(module.noise)} {how}"]
    if module.spikiness is not None:
        figures.append(f"input max/median {module.spikiness.max_to_median:.3g}")
        if module.spikiness.kurtosis is not None:
            figures.append(f"kurtosis {module.spikiness.kurtosis:.3g}")
    if module.worst_bin is not None:
        worst = module.worst_bin
        figures.append(f"worst {_db(worst.noise)} at timesteps {worst.start:g} to {worst.stop:g}")
    return (
        f"fragile under {module.scheme}, {place} of {len(ranking.modules)} by noise: "
        f"{', '.join(figures)}"
    )


def _db(noise: float) -> str:
    value = decibels(noise)
    return "without limit" if value is None else f"{value:.1f} dB"


def _relieve(value: _Json, recipe: Recipe, planned: Plan, taken: frozenset[Key]) -> None:
    """Bring rules to the modules that are left to them."""
    by_rule: dict[str, list[PlannedModule]] = {}
    for module in planned.modules:
        if module.disposition == "quantized" and module.pointer is not None:
            by_rule.setdefault(module.pointer, []).append(module)
    rules, lost = [], set()
    for index, rule in enumerate(recipe.rules):
        modules = by_rule.get(f"/rules/{index}", [])
        left = [module for module in modules if (module.part, module.name) not in taken]
        if len(left) == len(modules):
            rules.append(value["rules"][index])
        elif left:
            rules.append(_relieved(value["rules"][index], modules, left))
        else:
            lost.add(rule.scheme)
    value["rules"] = rules
    used = {rule["scheme"] for rule in rules}
    value["schemes"] = {
        name: scheme
        for name, scheme in value["schemes"].items()
        if name in used or name not in lost
    }
    if not any("smoothing" in scheme for scheme in value["schemes"].values()):
        # Siblings share smoothing factors and nothing else: without any, they are an error.
        value.pop("siblings", None)


def _relieved(rule: _Json, before: list[PlannedModule], left: list[PlannedModule]) -> _Json:
    emptied = {module.pattern for module in before} - {module.pattern for module in left}
    kept = {**rule, "modules": [each for each in rule["modules"] if each not in emptied]}
    count = rule.get("count")
    if isinstance(count, int):
        kept["count"] = len(left)
    elif isinstance(count, dict) and count.get("min", 1) > len(left):
        kept["count"] = {**count, "min": len(left)}
    return kept
