"""Names as patterns: nothing more, nothing less, and as few as a person would write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.name_groups import collapse, natural, skeleton
from quantrecipe.schema.patterns import Patterns

PIECES = ["a", "layers", "0", "1", "2", "3", "10", "07", "x1", "y2z3"]
NAMES = st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(".".join))
STRANGE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


@given(NAMES, NAMES)
def test_each_name_is_matched_by_its_own_pattern_alone(names: list[str], others: list[str]) -> None:
    groups = collapse(names)
    assert sorted(n for group in groups for n in group.names) == sorted(set(names))
    compiled = [Patterns.compile([group.pattern]) for group in groups]
    for name in {*names, *others}:
        matched = [i for i, pattern in enumerate(compiled) if pattern.matches(name) == 0]
        expected = [i for i, group in enumerate(groups) if name in group.names]
        assert matched == expected
        assert len(matched) == (name in names)


@given(st.lists(STRANGE, max_size=5))
def test_names_in_any_characters_have_patterns(names: list[str]) -> None:
    groups = collapse(names)
    for name in set(names):
        hits = [g for g in groups if Patterns.compile([g.pattern]).matches(name) == 0]
        assert len(hits) == 1
        assert name in hits[0].names


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ([], []),
        (["norm"], ["norm"]),
        ([f"layers.{i}.qkv" for i in range(34)], ["layers.{0..33}.qkv"]),
        (["l.3.w", "l.9.w", "l.31.w"], ["l.{3,9,31}.w"]),
        (["l.0", "l.1"], ["l.{0,1}"]),
        (["l.0", "l.1", "l.2", "l.7"], ["l.{0..2,7}"]),
        ([f"b{i}.w{j}" for i in range(3) for j in range(4)], ["b{0..2}.w{0..3}"]),
        (["d.0.r.0", "d.0.r.1", "d.1.r.0"], ["d.0.r.{0,1}", "d.1.r.0"]),
        (["l.00", "l.01"], ["l.{00,01}"]),
        (["l.2", "l.10", "k"], ["k", "l.{2,10}"]),
    ],
    ids=[
        "none", "one", "range", "list", "pair", "both", "product", "ragged", "zeros", "order",
    ],
)  # fmt: skip
def test_patterns_are_what_a_person_would_write(names: list[str], patterns: list[str]) -> None:
    assert [group.pattern for group in collapse(names)] == patterns


def test_more_names_than_a_pattern_may_stand_for_take_several() -> None:
    groups = collapse(f"l.{i}.e.{j}" for i in range(150) for j in range(150))
    assert sum(len(group.names) for group in groups) == 150 * 150
    assert 1 < len(groups) <= 4


def test_natural_order_and_skeleton() -> None:
    assert sorted(["a.10", "a.9", "a"], key=natural) == ["a", "a.9", "a.10"]
    assert skeleton("a.10.b2") == skeleton("a.9.b3") != skeleton("a.9.c3")
