"""The section on what is not quantized: every module, by exact patterns."""

from __future__ import annotations

from collections.abc import Sequence

from quantrecipe.evaluate.reporting.wording import count, stored_as
from quantrecipe.publishing.card.markdown import Markdown, codes
from quantrecipe.publishing.card.words import alike, by_part, long_table
from quantrecipe.publishing.facts import Facts
from quantrecipe.schema.lock import LockedModule


def protected(facts: Facts) -> list[Markdown]:
    """What is kept on purpose, with reasons; what is passed through, without."""
    modules = facts.lock.modules
    blocks: list[Markdown] = []
    kept = [module for module in modules if module.disposition == "protected"]
    if kept:
        said = f"{count(len(kept), 'module')} kept on purpose. Patterns match these, no others."
        blocks += [Markdown(said), _listed(kept, why=True)]
    passed = [module for module in modules if module.disposition == "passthrough"]
    if passed:
        said = f"{count(len(passed), 'module')} passed through: no rule of the recipe takes them."
        blocks += [Markdown(said), _listed(passed, why=False)]
    return blocks or [Markdown("Nothing: every module is quantized.")]


def _listed(modules: Sequence[LockedModule], *, why: bool) -> Markdown:
    rows: list[tuple[object, ...]] = []
    for mine in alike(modules, lambda module: (module.reason, stored_as(module.weight))):
        reason = (mine[0].reason or "",) if why else ()
        for parts, patterns, number in by_part(mine):
            kind = stored_as(mine[0].weight)
            rows.append((patterns, codes(parts), kind, f"{number:,}", *reason))
    headers = ("modules", "part", "stored as", "count", *(("reason",) if why else ()))
    return long_table("rows", headers, rows, "lllrl")
