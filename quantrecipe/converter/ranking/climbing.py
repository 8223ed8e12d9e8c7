"""The ladder: sets of growing size really protected, really converted, and judged by the user."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from quantrecipe.converter.planning import RecipeLike, open_recipe, plan
from quantrecipe.converter.ranking.choosing import knee
from quantrecipe.converter.ranking.protecting import protect
from quantrecipe.converter.ranking.results import Group, Ranking
from quantrecipe.converter.run import convert, unheard
from quantrecipe.schema.problems import QuantrecipeError

Order = Literal["ranked", "random", "reverse"]
"""Noisiest first; shuffled; noisiest last."""

Evaluate = Callable[[Path], float]
"""Given the folder of a conversion, says how bad it is: less is better."""

ORDERS: Final[tuple[Order, ...]] = ("ranked", "random", "reverse")


@dataclass(frozen=True, slots=True)
class Rung:
    """One conversion.

    Attributes:
        order: which groups were protected first.
        protected: how many groups.
        modules: how many modules those are.
        extra_bytes: what they cost.
        value: what the user's function made of it.
    """

    order: Order
    protected: int
    modules: int
    extra_bytes: int
    value: float


@dataclass(frozen=True, slots=True)
class Ladder:
    """What was found.

    Attributes:
        rungs: order by order, each by size.
        knee: the groups protected at the knee of the ranked order (see ``knee``).
    """

    rungs: tuple[Rung, ...]
    knee: int

    def of(self, order: Order) -> tuple[Rung, ...]:
        """The rungs of one order, by size."""
        return tuple(rung for rung in self.rungs if rung.order == order)


def default_rungs(groups: int) -> tuple[int, ...]:
    """0, 1, 2, 4, 8 and so on, and all."""
    powers = (1 << exponent for exponent in range(groups.bit_length()))
    return tuple(sorted({0, *powers, groups}))


def ladder(
    recipe: RecipeLike,
    source: Path | str | None,
    ranking: Ranking,
    evaluate: Evaluate,
    rungs: Sequence[int] | None = None,
    *,
    against: Sequence[Order] = (),
    seed: int = 0,
    jobs: int | None = None,
    notice: Callable[[str], None] = unheard,
) -> Ladder:
    """Protect the N noisiest groups, convert, evaluate; for every N.

    Each conversion goes into a temporary folder, which is removed once it was evaluated. A set
    that was evaluated already is not converted again.

    Args:
        recipe: what was ranked.
        source: as it was ranked.
        ranking: of ``recipe``.
        evaluate: called with the folder of each conversion; returns a finite number, the less the
            better.
        rungs: numbers of groups; ``None``: ``default_rungs``. More than there are count as all.
        against: orders to set beside the ranked one, in sets of the same sizes.
        seed: of the random order.
        jobs: threads of each conversion.
        notice: told what is being done.

    Raises:
        InvalidInput: a recipe does not hold, or a conversion misses a bound of it.
        QuantrecipeError: ``evaluate`` returned no finite number.
    """
    loaded = open_recipe(recipe)
    planned = plan(loaded, source)
    sizes = default_rungs(len(ranking.groups)) if rungs is None else rungs
    sizes = sorted({min(size, len(ranking.groups)) for size in sizes})
    known: dict[frozenset[Group], float] = {}
    found = []
    for order in dict.fromkeys(("ranked", *against)):
        groups = _in_order(ranking, order, seed)
        for size in sizes:
            chosen = groups[:size]
            if frozenset(chosen) not in known:
                notice(f"{order}, {size} of {len(groups)} protected")
                protected = protect(loaded, planned, ranking, chosen)
                with tempfile.TemporaryDirectory(prefix="quantrecipe-ladder-") as folder:
                    out = convert(protected, source, Path(folder) / "out", jobs=jobs, resume=False)
                    known[frozenset(chosen)] = _number(evaluate(out.out))
            found.append(
                Rung(
                    order,
                    size,
                    sum(len(group.modules) for group in chosen),
                    sum(group.extra_bytes for group in chosen),
                    known[frozenset(chosen)],
                )
            )
    ranked = [rung for rung in found if rung.order == "ranked"]
    at = knee([rung.protected for rung in ranked], [rung.value for rung in ranked])
    return Ladder(tuple(found), ranked[at].protected)


def _in_order(ranking: Ranking, order: Order, seed: int) -> Sequence[Group]:
    groups = list(ranking.groups)
    if order == "reverse":
        groups.reverse()
    elif order == "random":
        random.Random(seed).shuffle(groups)
    return groups


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise QuantrecipeError(
            f"the function of the ladder returned {value!r}\n"
            "  Return a finite number for each conversion, the less the better."
        )
    return float(value)
