"""Many numbered names as few patterns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.grouping import collapse
from quantrecipe.schema.patterns import Patterns

SEGMENTS = st.one_of(st.sampled_from(["layers", "w1", "a", "x2y"]), st.integers(0, 12).map(str))
NAMES = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)


@given(st.lists(NAMES, unique=True, max_size=40))
def test_patterns_match_exactly_what_they_stand_for(names: list[str]) -> None:
    found = collapse(names)
    assert sorted(name for _, members in found for name in members) == sorted(names)
    for pattern, members in found:
        matcher = Patterns.compile([pattern])
        assert [name for name in names if matcher.matches(name) is not None] == sorted(
            members, key=names.index
        )


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ([], []),
        (["a"], ["a"]),
        ([f"layers.{i}.w" for i in range(34)], ["layers.{0..33}.w"]),
        ([f"layers.{i}.w" for i in (3, 9, 31)], ["layers.{3,9,31}.w"]),
        ([f"layers.{i}.w" for i in (0, 1, 2, 7)], ["layers.{0..2,7}.w"]),
        ([f"b.{i}.n.{j}" for i in range(2) for j in range(3)], ["b.{0..1}.n.{0..2}"]),
        (["b.0.n.0", "b.0.n.1", "b.1.n.1"], ["b.0.n.{0..1}", "b.1.n.1"]),
        (["layer.00", "layer.01"], ["layer.00", "layer.01"]),
    ],
    ids=["none", "one", "all", "some", "runs", "grid", "no grid", "leading zeros"],
)
def test_collapse(names: list[str], patterns: list[str]) -> None:
    assert [pattern for pattern, _ in collapse(names)] == patterns
