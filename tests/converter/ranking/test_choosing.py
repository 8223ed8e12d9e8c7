"""The curve of bytes against noise is optimal everywhere, and choices on it are what they say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantrecipe.converter.ranking import Curve, Fragility, Group, choose, knee, top, trade_off
from quantrecipe.converter.ranking.ties import across_parts, grouped

# Noise in whole numbers has exact sums, so that brute force and the curve agree to the bit.
COSTS = st.integers(-3, 40)
NOISES = st.integers(0, 30).map(float)


def groups_of(pairs: Sequence[tuple[int, float]], part: str = "model") -> list[Group]:
    return [
        Group(((part, f"m{index:02}"),), noise, nbytes)
        for index, (nbytes, noise) in enumerate(pairs)
    ]


GROUPS = st.lists(st.tuples(COSTS, NOISES), max_size=9).map(groups_of)


def every_choice(groups: Sequence[Group]) -> list[tuple[int, float]]:
    """Bytes and noise left, of each set of groups."""
    return [
        (
            sum(group.extra_bytes for group in chosen),
            sum(group.noise for group in groups if group not in chosen),
        )
        for size in range(len(groups) + 1)
        for chosen in itertools.combinations(groups, size)
    ]


def near(noise: float) -> object:
    return pytest.approx(noise, abs=1e-9)


@given(GROUPS)
@settings(max_examples=30)
def test_the_curve_is_every_choice_that_no_other_beats(groups: list[Group]) -> None:
    found = every_choice(groups)
    best: list[tuple[int, float]] = []
    for nbytes, noise in sorted(found):
        if not best or noise < best[-1][1]:
            best.append((nbytes, noise))
    curve = trade_off(groups)
    assert curve.exact
    assert list(curve.nbytes) == [nbytes for nbytes, _ in best]
    assert list(curve.noise) == [near(noise) for _, noise in best]


@given(GROUPS)
@settings(max_examples=30)
def test_the_curve_falls_and_its_choices_add_up(groups: list[Group]) -> None:
    curve = trade_off(groups)
    for pair in itertools.pairwise(range(len(curve))):
        assert curve.nbytes[pair[0]] < curve.nbytes[pair[1]]
        assert curve.noise[pair[0]] > curve.noise[pair[1]]
    for point in range(len(curve)):
        chosen = curve.chosen(point)
        assert sum(group.extra_bytes for group in chosen) == curve.nbytes[point]
        left = sum(group.noise for group in groups if group not in chosen)
        assert left == near(curve.noise[point])


@given(GROUPS, st.integers(0, 200), st.floats(0, 200))
@settings(max_examples=30)
def test_goals_are_met_at_least_cost(groups: list[Group], budget: int, noise: float) -> None:
    def cost(chosen: Sequence[Group]) -> tuple[int, float]:
        left = sum(group.noise for group in groups if group not in chosen)
        return sum(group.extra_bytes for group in chosen), left

    found = every_choice(groups)
    spent, left = cost(choose(groups, budget=budget))
    assert spent <= budget
    assert left == min(each for nbytes, each in found if nbytes <= budget)
    spent, left = cost(choose(groups, noise=noise))
    assert left <= noise + 1e-9
    assert spent <= min(nbytes for nbytes, each in found if each <= noise)


@given(GROUPS, st.randoms(use_true_random=False), st.integers(0, 9))
def test_the_order_of_groups_changes_nothing(groups: list[Group], random: object, n: int) -> None:
    assert hasattr(random, "shuffle")
    shuffled = list(groups)
    random.shuffle(shuffled)
    first, second = trade_off(groups), trade_off(shuffled)
    assert (first.nbytes, first.noise, first.knee()) == (second.nbytes, second.noise, second.knee())
    assert set(top(groups, n)) == set(top(shuffled, n))


@given(GROUPS, st.integers(0, 12))
def test_top_takes_the_noisiest(groups: list[Group], count: int) -> None:
    chosen = top(groups, count)
    assert len(chosen) == min(count, len(groups))
    left = [group.noise for group in groups if group not in chosen]
    assert min((group.noise for group in chosen), default=math.inf) >= max(left, default=0)


def curve_error(curve: Curve, exact: Curve) -> int:
    """The most bytes that a choice has over the least that its noise can be had for."""
    return max(
        nbytes - exact.nbytes[exact.reaching(noise + 1e-9)]
        for nbytes, noise in zip(curve.nbytes, curve.noise, strict=True)
    )


def test_a_curve_of_too_many_choices_is_thinned_out_and_says_by_how_much() -> None:
    # Noise in proportion to bytes: no set of groups beats another.
    groups = groups_of([(1 << index, float(1 << index)) for index in range(10)])
    exact, thinned = trade_off(groups), trade_off(groups, most_points=64)
    assert (len(exact), exact.exact, exact.slack_bytes) == (1024, True, 0)
    assert not thinned.exact
    assert 16 <= len(thinned) <= 64
    assert (thinned.nbytes[0], thinned.nbytes[-1]) == (0, 1023)
    assert curve_error(thinned, exact) < thinned.slack_bytes <= 64


def test_hundreds_of_groups_of_a_few_shapes_are_solved_exactly() -> None:
    # Sizes as in a model of 34 layers; the noise of each is its own.
    sizes = [63_645_696, 21_215_232, 56_573_952, 56_573_952, 56_604_672] * 34
    groups = groups_of([(size, 1.0 / (1 + 7919 * i % 1009)) for i, size in enumerate(sizes)])
    curve = trade_off(groups)
    assert curve.exact
    # Half of all bytes, spent greedily, is never better.
    budget, spent, left = curve.nbytes[-1] // 2, 0, math.fsum(group.noise for group in groups)
    for group in sorted(groups, key=lambda group: -group.noise / group.extra_bytes):
        if spent + group.extra_bytes <= budget:
            spent, left = spent + group.extra_bytes, left - group.noise
    assert curve.noise[curve.within(budget)] <= left + 1e-9


@given(st.lists(st.tuples(COSTS, NOISES), max_size=5), st.lists(st.tuples(COSTS, NOISES)), COSTS)
def test_a_goal_for_each_part_is_the_goal_of_each(
    one: list[tuple[int, float]], other: list[tuple[int, float]], budget: int
) -> None:
    first, second = groups_of(one, "a"), groups_of(other[:5], "b")
    for goal in ({"budget": budget}, {"count": abs(budget)}, {"noise": float(abs(budget))}, {}):
        both = choose([*first, *second], per_part=True, **goal)
        assert both == choose(first, **goal) + choose(second, **goal)


def test_goals_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="one goal"):
        choose([], count=1, budget=1)
    across = Group((("a", "m"), ("b", "m")), 1.0, 1)
    with pytest.raises(ValueError, match="several parts"):
        choose([across], count=1, per_part=True)


@pytest.mark.parametrize(
    ("costs", "values", "at"),
    [
        ([0], [1], 0),
        ([0, 1], [1, 0], 0),
        ([0, 1, 2, 3], [10, 1, 0.5, 0], 1),
        ([0, 1, 2, 3, 12], [9, 6, 3, 0.1, 0], 3),
        ([0, 1, 2, 3], [3, 2, 1, 0], 0),
        ([0, 1, 2], [1, 1, 1], 0),
        ([0, 1, 2], [1, 2, 3], 0),
        ([5, 5, 5], [3, 2, 1], 0),
    ],
    ids=["one", "two", "bend", "planted", "straight", "flat", "rising", "free"],
)
def test_the_knee_is_furthest_below_the_line_between_the_ends(
    costs: list[float], values: list[float], at: int
) -> None:
    assert knee(costs, values) == at
    assert knee([1e9 * cost - 5 for cost in costs], [1e-6 * value for value in values]) == at


def module(part: str, name: str, noise: float = 1.0, nbytes: int = 8) -> Fragility:
    return Fragility(
        part=part,
        name=name,
        scheme="all",
        noise=noise,
        basis="weight",
        weight_noise=noise,
        predicted=None,
        activation_share=None,
        measured=None,
        tokens=0,
        spikiness=None,
        worst_bin=None,
        blind=False,
        extra_bytes=nbytes,
    )


KEYS = [(part, name) for part in ("a", "b") for name in ("k", "o", "q", "v")]


@given(
    st.lists(st.lists(st.sampled_from([*KEYS, ("a", "elsewhere")]), max_size=4), max_size=4),
    st.lists(NOISES, min_size=len(KEYS), max_size=len(KEYS)),
)
def test_families_are_never_torn_apart(
    families: list[list[tuple[str, str]]], noises: list[float]
) -> None:
    modules = [module(*key, noise) for key, noise in zip(KEYS, noises, strict=True)]
    found = grouped(modules, families)
    assert sorted(key for group in found for key in group.modules) == KEYS
    home = {key: group for group in found for key in group.modules}
    for family in families:
        assert len({home[key].modules for key in family if key in home}) <= 1
    # Nothing is together that no chain of families ties.
    assert len(found) >= len(KEYS) - sum(max(0, len(set(family)) - 1) for family in families)
    assert [group.noise for group in found] == sorted((g.noise for g in found), reverse=True)
    assert sum(group.noise for group in found) == sum(noises)
    assert sum(group.extra_bytes for group in found) == 8 * len(KEYS)


def test_parts_are_tied_by_name() -> None:
    modules = [module(part, name) for part, name in KEYS if (part, name) != ("b", "q")]
    found = {group.modules for group in grouped(modules, across_parts(modules))}
    assert found == {(("a", name), ("b", name)) for name in "kov"} | {(("a", "q"),)}
