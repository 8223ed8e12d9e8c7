"""The section on errors: how near stored weights are to their source."""

from __future__ import annotations

import math
from statistics import median

from quantrecipe.evaluate.reporting.wording import count, decibels
from quantrecipe.publishing.card.markdown import Markdown, code
from quantrecipe.publishing.card.words import long_table
from quantrecipe.publishing.facts import Facts
from quantrecipe.schema.lock import LockedModule
from quantrecipe.schema.name_groups import starred


def errors(facts: Facts) -> list[Markdown]:
    """Signal to noise by kind of module: the lowest, the median, the highest."""
    measured = [module for module in facts.lock.modules if module.error is not None]
    if not measured:
        return []
    kinds: dict[str, list[LockedModule]] = {}
    for module in measured:
        kinds.setdefault(starred(module.name), []).append(module)
    rows = []
    for kind, mine in kinds.items():
        values = sorted(_sqnr(module) for module in mine)
        worst = min(mine, key=lambda module: (_sqnr(module), module.part, module.name))
        spread = (values[0], median(values), values[-1])
        named = Markdown(f"{code(worst.part)}: {code(worst.name)}")
        rows.append((values[0], (code(kind), f"{len(mine):,}", *map(decibels, spread), named)))
    rows.sort(key=lambda row: row[0])
    worst = min(measured, key=lambda module: (_sqnr(module), module.part, module.name))
    said = (
        "Signal to quantization noise of each weight against its source, in decibels, as it was "
        f"measured while converting. The lowest of {count(len(measured), 'module')}: "
        f"{decibels(_sqnr(worst))} ({code(worst.part)}: {code(worst.name)})."
    )
    least = facts.lock.recipe.bounds.min_weight_sqnr_db
    if least is not None:
        said += f" The recipe asks for {least:g} at least."
    headers = ("modules", "count", "lowest", "median", "highest", "the lowest is")
    listed = long_table("kinds of modules", headers, [row for _, row in rows], "lrrrrl")
    return [Markdown(said), listed]


def _sqnr(module: LockedModule) -> float:
    found = module.error
    return math.inf if found is None or found.sqnr_db is None else found.sqnr_db
