"""Patterns that are short and take exactly the modules that they are for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.patterns import Patterns, is_exact
from quantrecipe.schema.selection import EMBEDDING_NAMES
from quantrecipe.schema.short_patterns import short_patterns

SEGMENTS = st.sampled_from(
    ["layers", "blocks", "0", "1", "10", "007", "attn", "w1", "a*b", "{x}", "re:", "embed", "head"]
)
NAMES = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)


@given(names=st.lists(NAMES, min_size=1, max_size=12, unique=True), data=st.data())
def test_they_take_these_modules_and_no_others(names: list[str], data: st.DataObject) -> None:
    wanted = set(data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True)))
    others = set(names) - wanted
    patterns = short_patterns(wanted, others)
    compiled = Patterns.compile(patterns)
    assert {name for name in names if compiled.matches(name) is not None} == wanted
    assert patterns == short_patterns(list(wanted)[::-1], list(others)[::-1])
    # Each takes something that none before it does: the planner refuses a pattern that does not.
    assert {compiled.matches(name) for name in wanted} == set(range(len(patterns)))
    for name in wanted:
        # What would be a wildcard is written as an expression, which is none of one name only.
        if EMBEDDING_NAMES.matches(name) is not None and not set("*{}:") & set(name):
            taken = compiled.matches(name)
            assert taken is not None
            assert is_exact(patterns[taken])


BLOCKS = [f"layers.{layer}.{name}" for layer in range(4) for name in ("attn.q", "attn.o", "mlp")]


@pytest.mark.parametrize(
    ("wanted", "others", "patterns"),
    [
        (BLOCKS, ["head"], ["layers.**"]),
        (BLOCKS, [], ["**"]),
        (["layers.0.a"], [], ["layers.*.a"]),
        ([name for name in BLOCKS if "attn" in name], ["layers.0.mlp"], ["layers.*.attn.**"]),
        ([name for name in BLOCKS if name.endswith("q")], BLOCKS[1::3], ["layers.*.attn.q"]),
        (BLOCKS[3:], BLOCKS[:3], ["layers.{1..3}.attn.q", "layers.{1..3}.attn.o",
                                  "layers.{1..3}.mlp"]),
        (["head", "token_embd"], ["norm"], ["head", "token_embd"]),
        (["text.embed", "text.a", "text.b"], ["c"], ["text.a", "text.b", "text.embed"]),
    ],
)  # fmt: skip
def test_how_short_they_are(wanted: list[str], others: list[str], patterns: list[str]) -> None:
    assert sorted(short_patterns(wanted, others)) == sorted(patterns)
