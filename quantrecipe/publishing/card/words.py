"""Numbers and ways of storing, in the words that a card uses in several places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Final

from quantrecipe.evaluate.reporting.wording import size
from quantrecipe.publishing.card.markdown import Markdown, codes, folded, table
from quantrecipe.schema.lock import Lock, LockedModule
from quantrecipe.schema.name_groups import collapse

MANY: Final = 12
"""Rows of a table beyond which it is folded away."""


def share(part: int, whole: int) -> str:
    """A part of a whole in per cent, and never 0 or 100 where that is not so."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    if 0 < percent < 0.05:
        return "< 0.1 %"
    if 99.95 <= percent < 100:
        return "> 99.9 %"
    return f"{percent:.1f} %"


def bytes_text(count: int) -> str:
    """``9.29 GB (9,288,123,456 bytes)``."""
    return f"{size(count)} ({count:,} bytes)" if count >= 1000 else f"{count} bytes"


def weights_in(module: LockedModule) -> int:
    """The numbers of a module's weight."""
    return prod(module.shape)


def numbers_in(lock: Lock) -> int:
    """All parameters: weights, biases, and tensors of no module."""
    biases = sum(
        prod(module.tensors["bias"].shape) for module in lock.modules if "bias" in module.tensors
    )
    others = sum(prod(other.tensor.shape) for other in lock.others)
    return sum(map(weights_in, lock.modules)) + biases + others


def alike(
    modules: Iterable[LockedModule], key: Callable[[LockedModule], object]
) -> list[list[LockedModule]]:
    """Modules with the same key together, in the order of the first of them."""
    found: dict[object, list[LockedModule]] = {}
    for module in modules:
        found.setdefault(key(module), []).append(module)
    return list(found.values())


def parts_of(lock: Lock) -> list[str]:
    """The parts, in the order of their names."""
    return sorted({m.part for m in lock.modules} | {other.part for other in lock.others})


def patterns(names: Iterable[str]) -> list[str]:
    """Module patterns that match these names, each by one of them, and no other name."""
    return [group.pattern for group in collapse(names)]


def by_part(modules: Sequence[LockedModule]) -> list[tuple[list[str], Markdown, int]]:
    """Parts, the patterns of their modules, and how many; parts with the same ones together."""
    names: dict[str, list[str]] = {}
    for module in modules:
        names.setdefault(module.part, []).append(module.name)
    found: dict[tuple[str, ...], list[str]] = {}
    for part, mine in names.items():
        found.setdefault(tuple(patterns(mine)), []).append(part)
    return [
        (parts, codes(written), sum(len(names[part]) for part in parts))
        for written, parts in found.items()
    ]


def long_table(
    what: str, headers: Sequence[object], rows: Sequence[Sequence[object]], align: str
) -> Markdown:
    """A table, folded away if it is long; ``what`` its rows are, in words of our own."""
    listed = table(headers, rows, align)
    return listed if len(rows) <= MANY else folded(f"{len(rows):,} {what}", listed)
