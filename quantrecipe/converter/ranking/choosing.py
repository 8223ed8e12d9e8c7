"""Choosing what to protect: every optimal trade of bytes against noise, and the knee of it.

Protecting a group of modules costs bytes and takes its noise away. Which groups to take is a
knapsack; with a few hundred groups of a few shapes it is solved exactly, for every budget at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quantrecipe.converter.ranking.results import Group

_Integers = npt.NDArray[np.int64]

RESOLUTION_BITS: Final = 40
"""Noise is added up in units of ``2^-40`` of the noise of all groups: whole numbers, which have one
sum in whatever order, so that "less noise" never means a rounding error."""

MOST_POINTS: Final = 1 << 18
"""Points of a curve from which on it is thinned out. Hundreds of groups of random sizes have some
thousands; only noise that is proportional to bytes makes more than this."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Every choice that no other choice beats: fewer bytes, or less noise.

    It begins with protecting nothing and ends with protecting all that has noise.

    Attributes:
        groups: what there is to choose from.
        nbytes: the bytes that each choice adds, ascending.
        noise: the noise-to-signal ratio that each leaves, strictly descending; the last is 0.
        exact: whether these are all of them. If the curve was thinned out, a choice adds fewer than
            ``slack_bytes`` more than the least that its noise can be had for.
        slack_bytes: 0 if exact.
    """

    groups: tuple[Group, ...]
    nbytes: tuple[int, ...]
    noise: tuple[float, ...]
    exact: bool
    slack_bytes: int
    _chosen: npt.NDArray[np.uint64] = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.nbytes)

    def chosen(self, point: int) -> tuple[Group, ...]:
        """The groups that a choice protects, in the order of ``groups``."""
        words = self._chosen[point]
        return tuple(
            group
            for index, group in enumerate(self.groups)
            if int(words[index // 64]) >> (index % 64) & 1
        )

    def within(self, budget: int) -> int:
        """The choice with the least noise that adds at most ``budget`` bytes."""
        return int(np.searchsorted(self.nbytes, max(0, budget), side="right")) - 1

    def reaching(self, noise: float) -> int:
        """The choice with the fewest bytes that leaves at most this noise-to-signal ratio."""
        return next(point for point, left in enumerate(self.noise) if left <= max(0.0, noise))

    def knee(self) -> int:
        """The choice at the knee of the curve; see ``knee``."""
        return knee(self.nbytes, self.noise)


def trade_off(groups: Sequence[Group], most_points: int = MOST_POINTS) -> Curve:
    """The whole curve of bytes against noise (Nemhauser and Ullmann's dynamic program).

    Groups are taken up one after the other; of all choices among those seen so far, only the ones
    that no other beats are kept. A choice that is beaten stays so whatever is added to both, so
    none is lost: the result is optimal for every budget, to ``RESOLUTION_BITS``.

    Args:
        groups: in any order; it shows only where two choices have equal bytes and equal noise.
        most_points: more choices than this are thinned out to one for each of as many equal steps
            of bytes.
    """
    ordered = tuple(groups)
    total = sum(group.noise for group in ordered)
    gains = [_units(group.noise, total) for group in ordered]
    # What costs nothing comes first, what is large last: choices stay few for longest.
    order = sorted(range(len(ordered)), key=lambda index: (ordered[index].extra_bytes, index))
    cost, gain = np.zeros(1, np.int64), np.zeros(1, np.int64)
    chosen = np.zeros((1, -(-len(ordered) // 64) or 1), np.uint64)
    slack = 0
    for index in order:
        if gains[index] <= 0 and ordered[index].extra_bytes >= 0:
            continue
        with_it = chosen.copy()
        with_it[:, index // 64] |= np.uint64(1 << (index % 64))
        cost = np.concatenate([cost, cost + ordered[index].extra_bytes])
        gain = np.concatenate([gain, gain + gains[index]])
        kept = _unbeaten(cost, gain)
        if len(kept) > most_points:
            kept, step = _thinned(kept, cost, most_points)
            slack += step
        cost, gain = cost[kept], gain[kept]
        chosen = np.concatenate([chosen, with_it])[kept]
    everything = sum(gains)
    noise = [float(everything - each) / 2**RESOLUTION_BITS * total for each in gain.tolist()]
    return Curve(ordered, tuple(cost.tolist()), tuple(noise), slack == 0, slack, chosen)


def _units(noise: float, total: float) -> int:
    return round(noise / total * 2**RESOLUTION_BITS) if total else 0


def _unbeaten(cost: _Integers, gain: _Integers) -> npt.NDArray[np.intp]:
    """Where the choices are that no other beats, by ascending cost; of equal ones the first."""
    order = np.lexsort((-gain, cost))
    best = np.maximum.accumulate(gain[order])
    kept = np.ones(len(order), np.bool_)
    kept[1:] = gain[order][1:] > best[:-1]
    return order[kept]


def _thinned(
    kept: npt.NDArray[np.intp], cost: _Integers, most: int
) -> tuple[npt.NDArray[np.intp], int]:
    """The last, and so the best, choice of each step of bytes; both ends stay."""
    costs = cost[kept]
    step = int(costs[-1] - costs[0]) // (most - 1) + 1
    last = np.ones(len(kept), np.bool_)
    steps = (costs - costs[0]) // step
    last[:-1] = steps[1:] != steps[:-1]
    last[0] = True
    return kept[last], step


def top(groups: Sequence[Group], count: int) -> tuple[Group, ...]:
    """The ``count`` groups with the most noise; of equal ones, those with the fewest bytes."""
    return tuple(sorted(groups, key=lambda each: (-each.noise, each.extra_bytes, each.modules)))[
        :count
    ]


def choose(
    groups: Sequence[Group],
    *,
    count: int | None = None,
    budget: int | None = None,
    noise: float | None = None,
    per_part: bool = False,
) -> tuple[Group, ...]:
    """The groups to protect for one goal; without a goal, those at the knee of the curve.

    Args:
        groups: what there is to choose from.
        count: as many as this, the noisiest.
        budget: what leaves the least noise for this many bytes at most.
        noise: what takes the fewest bytes to leave this noise-to-signal ratio at most.
        per_part: whether the goal holds for each part by itself; every group is of one part then.

    Returns:
        Groups in the order of ``groups``.

    Raises:
        ValueError: more than one goal, or ``per_part`` and a group of several parts.
    """
    if sum(goal is not None for goal in (count, budget, noise)) > 1:
        raise ValueError("one goal at a time")
    if per_part:
        if any(len(group.parts) > 1 for group in groups):
            raise ValueError("groups of several parts are of no part by itself")
        parts = dict.fromkeys(part for group in groups for part in group.parts)
        chosen = {
            group
            for part in parts
            for group in choose(
                [each for each in groups if part in each.parts],
                count=count,
                budget=budget,
                noise=noise,
            )
        }
    elif count is not None:
        chosen = set(top(groups, count))
    else:
        curve = trade_off(groups)
        point = curve.knee()
        if budget is not None:
            point = curve.within(budget)
        elif noise is not None:
            point = curve.reaching(noise)
        chosen = set(curve.chosen(point))
    return tuple(group for group in groups if group in chosen)


def knee(costs: Sequence[float], values: Sequence[float]) -> int:
    """The point of a falling curve that lies furthest below the line between its ends.

    Both axes are taken from 0 to 1 between the ends first, so units do not matter: it is where
    ``(cost - first) / (last - first) + (value - last) / (first - last)`` is smallest. Of equal
    points it is the cheapest; a curve that does not fall has its knee at its beginning.

    Args:
        costs: ascending.
        values: what they buy; less is better.
    """
    x, y = np.asarray(costs, np.float64), np.asarray(values, np.float64)
    if len(x) < 3 or x[-1] <= x[0] or not y[-1] < y[0]:
        return 0
    below: Any = (x - x[0]) / (x[-1] - x[0]) + (y - y[-1]) / (y[0] - y[-1])
    return int(np.argmin(below))
