"""Siblings: which modules a recipe ties, what it may not tie, and the groups that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.plan import SmoothingGroup
from quantrecipe.schema.planning import check_selection, make_plan
from quantrecipe.schema.siblings import tie

SMOOTHING = {"kind": "smoothquant", "alpha": 0.5, "apply": "online", "statistics": "s.safetensors"}
INT8 = {"weight": {"format": "int8", "granularity": "channel"}}
SEGMENTS = st.sampled_from(["a", "b", "w1", "w3", "0", "1"])
NAMES = st.lists(SEGMENTS, min_size=1, max_size=3).map(".".join)
PATTERNS = st.lists(SEGMENTS | st.just("*"), min_size=1, max_size=3).map(".".join)


def stars_of(pattern: str, name: str) -> tuple[str, ...] | None:
    """What the ``*`` of a pattern stand for, spelled out."""
    wanted, segments = pattern.split("."), name.split(".")
    pairs = list(zip(wanted, segments, strict=False))
    if len(wanted) != len(segments) or any(w not in ("*", s) for w, s in pairs):
        return None
    return tuple(s for w, s in pairs if w == "*")


@given(st.lists(PATTERNS, min_size=2, max_size=3), st.sets(NAMES, max_size=8))
def test_two_are_tied_where_their_stars_stand_for_the_same(
    patterns: Sequence[str], names: set[str]
) -> None:
    found = tie([patterns], {"p": names})
    tied = {frozenset((a, b)) for g in found.siblings for a in g.modules for b in g.modules}
    for one in names:
        for other in names - {one}:
            alike = any(
                stars_of(p, one) is not None and stars_of(p, one) == stars_of(q, other)
                for p in patterns
                for q in patterns
            )
            assert (frozenset((one, other)) in tied) == alike
    fits = [any(stars_of(pattern, name) is not None for name in names) for pattern in patterns]
    told = {p.pointer for p in found.problems if p.kind == "takes-nothing"}
    assert told == {f"/siblings/0/{place}" for place, fit in enumerate(fits) if not fit}
    assert any(p.kind == "ties-nothing" for p in found.problems) == (
        all(fits) and not found.siblings
    )


@given(st.lists(PATTERNS, min_size=2, max_size=3), st.sets(NAMES, max_size=8), st.randoms())
def test_the_order_of_patterns_and_names_is_none(
    patterns: list[str], names: set[str], random: Any
) -> None:
    shuffled = random.sample(patterns, len(patterns))
    one, other = tie([patterns], {"p": names}), tie([shuffled], {"p": sorted(names, reverse=True)})
    assert {g.modules for g in one.siblings} == {g.modules for g in other.siblings}


def test_parts_are_apart() -> None:
    found = tie([["*.w1", "*.w3"]], {"one": ["a.w1", "a.w3"], "two": ["a.w1", "b.w3"]})
    assert [(group.part, group.modules) for group in found.siblings] == [("one", ("a.w1", "a.w3"))]
    assert not found.problems


# -- in a plan ------------------------------------------------------------------------------------


def planned(headers: ModuleType, sizes: dict[str, int], **fields: Any) -> Any:
    """The arguments of a plan: linears of 6 outputs, and a recipe that smooths all of them."""
    schemes = {"a": INT8 | {"smoothing": SMOOTHING}}
    source = headers.source(*(headers.linear(name, 6, size) for name, size in sizes.items()))
    return headers.recipe(schemes=schemes, **fields), [source]


def test_groups_of_a_plan(headers: ModuleType) -> None:
    sizes = dict.fromkeys(["0.w1", "0.w3", "1.w1", "1.w3", "2.w1", "2.w3", "o"], 4)
    recipe, parts = planned(
        headers,
        sizes,
        siblings=[["*.w1", "*.w3"]],
        protected=[{"modules": ["1.w3", "2.*"], "dtype": "float32", "reason": "spikes"}],
    )
    smoothing = recipe.schemes["a"].smoothing
    assert make_plan(recipe, parts).smoothing_groups == (
        SmoothingGroup("model", ("0.w1", "0.w3"), (), smoothing),
        SmoothingGroup("model", ("1.w1",), ("1.w3",), smoothing),
        SmoothingGroup("model", ("o",), (), smoothing),
    )


def test_without_siblings_everybody_is_alone(headers: ModuleType) -> None:
    recipe, parts = planned(headers, {"a": 4, "b": 4})
    assert [g.modules for g in make_plan(recipe, parts).smoothing_groups] == [("a",), ("b",)]


BOTH = [{"modules": ["a"], "scheme": "a"}, {"modules": ["b"], "scheme": "b"}]
REFUSED: dict[str, tuple[dict[str, Any], dict[str, int], list[tuple[str, str | None]]]] = {
    "a name that no module has": (
        {"siblings": [["a", "c"]]},
        {"a": 4, "b": 4},
        [("takes-nothing", "/siblings/0/1")],
    ),
    "nothing tied": (
        {"siblings": [["*.w1", "*.w3"]]},
        {"0.w1": 4, "1.w3": 4},
        [("ties-nothing", "/siblings/0")],
    ),
    "tied twice": (
        {"siblings": [["a", "b"], ["b", "c"]]},
        {"a": 4, "b": 4, "c": 4},
        [("tied-twice", "/siblings/1")],
    ),
    "other inputs": (
        {"siblings": [["a", "b"]]},
        {"a": 4, "b": 8},
        [("siblings-differ", "/siblings/0")],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(headers: ModuleType, case: str) -> None:
    fields, sizes, expected = REFUSED[case]
    found = check_selection(*planned(headers, sizes, **fields))
    assert [(problem.kind, problem.pointer) for problem in found] == expected


@pytest.mark.parametrize(
    "smoothing",
    [None, SMOOTHING | {"alpha": 0.6}, SMOOTHING | {"power_of_two": True}],
    ids=["not smoothed", "another alpha", "powers of two"],
)
def test_quantized_siblings_are_smoothed_alike(
    headers: ModuleType, smoothing: dict[str, Any] | None
) -> None:
    other = INT8 | ({"smoothing": smoothing} if smoothing else {})
    recipe = headers.recipe(
        schemes={"a": INT8 | {"smoothing": SMOOTHING}, "b": other},
        rules=BOTH,
        siblings=[["a", "b"]],
    )
    source = headers.source(headers.linear("a", 6, 4), headers.linear("b", 6, 4))
    (problem,) = check_selection(recipe, [source])
    assert (problem.kind, problem.pointer) == ("siblings-differ", "/siblings/0")
    assert "'a'" in problem.message
    assert "'b'" in problem.message
