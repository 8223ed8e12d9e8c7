"""Which entry takes which module: order, parts, counts, and patterns that take nothing."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.layout_reading import PartContents, read_part
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.registry import named_layout
from quantrecipe.schema.selection import Selection, select

LAYER = ["attention.qkv", "attention.o", "feed_forward.w1", "feed_forward.w2"]
NAMES = [f"layers.{index}.{name}" for index in range(3) for name in LAYER] + ["proj"]


def rule(*modules: str, **fields: Any) -> dict[str, Any]:
    return {"modules": list(modules), "scheme": "a"} | fields


def keep(*modules: str, **fields: Any) -> dict[str, Any]:
    return {"modules": list(modules), "dtype": "bfloat16", "reason": "on purpose"} | fields


class Chooser:
    """Selects among bfloat16 linears of these names, and a few tensors that are no modules."""

    def __init__(self, headers: ModuleType) -> None:
        self.headers = headers

    def contents(self, part: str, names: Iterable[str]) -> PartContents:
        tensors = [self.headers.linear(name, 4, 4) for name in names]
        tensors += [
            self.headers.tensor("layers.0.norm.weight", "bfloat16", 4),
            self.headers.tensor("patch.weight", "bfloat16", 4, 3, 2, 2),
            self.headers.tensor("codes.weight", "uint8", 4, 4),
        ]
        return read_part(named_layout("plain"), self.headers.source(*tensors, name=part))

    def __call__(
        self,
        rules: list[Any],
        protected: list[Any] | None = None,
        parts: dict[str, list[str]] | None = None,
        **changes: Any,
    ) -> Selection:
        recipe = self.headers.recipe(rules=rules, protected=protected or [], **changes)
        named = parts if parts is not None else {"model": NAMES}
        return select(recipe, {part: self.contents(part, names) for part, names in named.items()})


@pytest.fixture(scope="session")
def choose(headers: ModuleType) -> Chooser:
    return Chooser(headers)


def one(selection: Selection) -> Problem:
    (problem,) = selection.problems
    return problem


def by_pointer(selection: Selection) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for (_, name), taken in selection.taken.items():
        found.setdefault(taken.pointer, set()).add(name)
    return found


# -- order ----------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_takes_a_module(choose: Chooser) -> None:
    selection = choose([rule("layers.*.attention.*"), rule("layers.**", "proj")])
    assert not selection.problems
    assert by_pointer(selection) == {
        "/rules/0": {name for name in NAMES if "attention" in name},
        "/rules/1": {name for name in NAMES if "attention" not in name},
    }
    assert selection.taken["model", "proj"].pattern == "proj"
    assert selection.taken["model", "layers.0.attention.o"].pattern == "layers.*.attention.*"


def test_protected_entries_come_before_rules(choose: Chooser) -> None:
    selection = choose([rule("**")], [keep("layers.1.**"), keep("proj")])
    assert not selection.problems
    found = by_pointer(selection)
    assert found["/protected/0"] == {name for name in NAMES if name.startswith("layers.1.")}
    assert found["/protected/1"] == {"proj"}
    assert len(found["/rules/0"]) == len(NAMES) - 5
    taken = selection.taken["model", "proj"]
    assert taken.rule is None
    assert taken.protected is not None
    assert taken.protected.reason == "on purpose"


def test_what_nothing_matches_is_taken_by_nobody(choose: Chooser) -> None:
    selection = choose([rule("proj")])
    assert not selection.problems
    assert set(selection.taken) == {("model", "proj")}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            [rule("**", parts=["one"])],
            {("one", "x"): "/rules/0", ("one", "y"): "/rules/0"},
        ),
        (
            [rule("x", parts=["two"]), rule("**")],
            {
                ("one", "x"): "/rules/1",
                ("one", "y"): "/rules/1",
                ("two", "x"): "/rules/0",
                ("two", "y"): "/rules/1",
            },
        ),
        (
            [rule("x", parts=["one", "two"], count=2)],
            {("one", "x"): "/rules/0", ("two", "x"): "/rules/0"},
        ),
    ],
    ids=["one part", "one part first", "both"],
)
def test_an_entry_may_hold_for_some_parts(
    choose: Chooser, rules: list[Any], expected: dict[tuple[str, str], str]
) -> None:
    selection = choose(rules, parts={"one": ["x", "y"], "two": ["x", "y"]})
    assert not selection.problems
    assert {key: taken.pointer for key, taken in selection.taken.items()} == expected


# -- counts ---------------------------------------------------------------------------------------

COUNTS = [
    ("exact", 3, None),
    ("one fewer", 4, "takes 3 module(s), not 4"),
    ("one more", 2, "takes 3 module(s), not 2"),
    ("in range", {"min": 1, "max": 3}, None),
    ("at least", {"min": 3}, None),
    ("too few", {"min": 4}, "takes 3 module(s), not 4 to any number"),
    ("too many", {"max": 2}, "takes 3 module(s), not 1 to 2"),
    ("none is fine", {"min": 0}, None),
    ("none is fine, and two at most", {"min": 0, "max": 2}, "takes 3 module(s), not 0 to 2"),
]


@pytest.mark.parametrize(("count", "said"), [c[1:] for c in COUNTS], ids=[c[0] for c in COUNTS])
@pytest.mark.parametrize("section", ["rules", "protected"])
def test_a_count_has_to_hold(choose: Chooser, section: str, count: Any, said: str | None) -> None:
    entry = (rule if section == "rules" else keep)("layers.*.feed_forward.w2", count=count)
    other = rule("proj")
    selection = choose([entry, other]) if section == "rules" else choose([other], [entry])
    if said is None:
        assert not selection.problems
        return
    problem = one(selection)
    assert (problem.kind, problem.pointer) == ("count", f"/{section}/0/count")
    assert problem.message == said


def test_a_count_is_over_all_parts(choose: Chooser) -> None:
    parts = {"one": ["x"], "two": ["x"]}
    assert not choose([rule("x", count=2)], parts=parts).problems
    assert one(choose([rule("x", count=1)], parts=parts)).kind == "count"


# -- patterns that take nothing -------------------------------------------------------------------

DEAD = [
    ("typo", "layers.0.atention.qkv", "Did you mean 'layers.0.attention.qkv'?"),
    ("typo in a glob", "layers.*.attention.qvk", ".attention.qkv'?"),
    ("typo in a range", "layers.{0..2}.feed_forwrad.w1", "feed_forward.w1'?"),
    ("far off", "decoder", "Modules are called like 'layers.0.attention.o'."),
    ("out of range", "layers.{3..5}.attention.o", ".attention.o'?"),
    ("case", "re:LAYERS.*", "Modules are called like"),
    ("vector", "layers.*.norm", "'layers.0.norm', but that has shape [4]: only two-dimensional"),
    ("convolution", "patch", "'patch', but that has shape [4, 3, 2, 2]"),
    ("whole numbers", "codes", "'codes', but 'codes.weight' is uint8"),
    ("tensor name", "proj.weight", "modules, not tensors: 'proj', without '.weight'"),
    ("tensor names", "layers.*.attention.qkv.weight", "not tensors: 'layers.0.attention.qkv'"),
    (
        "one segment only",
        "layers.*",
        "'*' stands for one segment of a name: did you mean 'layers.**'?",
    ),
]


@pytest.mark.parametrize(("text", "hint"), [d[1:] for d in DEAD], ids=[d[0] for d in DEAD])
@pytest.mark.parametrize("section", ["rules", "protected"])
def test_a_pattern_that_takes_nothing_is_an_error(
    choose: Chooser, section: str, text: str, hint: str
) -> None:
    entry = (rule if section == "rules" else keep)("proj", text)
    selection = choose([entry]) if section == "rules" else choose([rule("layers.**")], [entry])
    problem = one(selection)
    assert (problem.kind, problem.pointer) == ("takes-nothing", f"/{section}/0/modules/1")
    assert problem.message == f"pattern {text!r} takes no module"
    assert problem.hint is not None
    assert hint in problem.hint


def test_a_pattern_for_another_part_is_told_where_it_matches(choose: Chooser) -> None:
    parts = {"one": ["x"], "two": ["y"]}
    problem = one(choose([rule("y", parts=["one"]), rule("x")], parts=parts))
    assert problem.hint == "It matches 'y' of part 'two', which the entry leaves out."


def test_no_modules_at_all(choose: Chooser) -> None:
    problem = one(choose([rule("x")], parts={"one": []}))
    assert problem.hint == "There are no modules."


def test_a_pattern_that_may_take_nothing(choose: Chooser) -> None:
    assert not choose([rule("absent", count={"min": 0}), rule("**")]).problems


SHADOWED: dict[str, tuple[list[Any], list[Any], str, str]] = {
    "by a rule": (
        [rule("layers.**"), rule("layers.*.attention.*", "proj")],
        [],
        "/rules/1/modules/0",
        "all 6 it matches were taken by /rules/0",
    ),
    "by a protected entry": (
        [rule("proj"), rule("layers.**")],
        [keep("proj")],
        "/rules/0/modules/0",
        "all 1 it matches were taken by /protected/0",
    ),
    "by an earlier pattern": (
        [rule("**", "proj")],
        [],
        "/rules/0/modules/1",
        "all 1 it matches were taken by an earlier pattern of /rules/0",
    ),
    "by the same pattern": (
        [rule("proj", "proj")],
        [],
        "/rules/0/modules/1",
        "all 1 it matches were taken by an earlier pattern of /rules/0",
    ),
    "by several": (
        [rule("layers.0.**"), rule("layers.{1,2}.**"), rule("layers.**")],
        [],
        "/rules/2/modules/0",
        "all 12 it matches were taken by /rules/0 and /rules/1",
    ),
}


@pytest.mark.parametrize("case", SHADOWED)
def test_a_shadowed_pattern_is_told_who_took_its_modules(choose: Chooser, case: str) -> None:
    rules, protected, pointer, said = SHADOWED[case]
    problem = one(choose(rules, protected))
    assert (problem.kind, problem.pointer) == ("takes-nothing", pointer)
    assert said in problem.message


def test_every_dead_pattern_is_named_at_once(choose: Chooser) -> None:
    selection = choose([rule("x1", "proj", "x2"), rule("x3", count=2)], [keep("x4")])
    assert [(problem.kind, problem.pointer) for problem in selection.problems] == [
        ("takes-nothing", "/protected/0/modules/0"),
        ("takes-nothing", "/rules/0/modules/0"),
        ("takes-nothing", "/rules/0/modules/2"),
        ("takes-nothing", "/rules/1/modules/0"),
        ("count", "/rules/1/count"),
    ]


def test_a_module_that_cannot_be_read_is_not_the_patterns_fault(headers: ModuleType) -> None:
    tensors = [*headers.fp8("a.x", 4, 4), headers.linear("a.y", 4, 4, "float8_e4m3fn")]
    contents = read_part(named_layout("fp8-scaled"), headers.source(*tensors))
    assert [problem.kind for problem in contents.problems] == ["missing-scale"]
    recipe = headers.recipe(rules=[rule("a.x", "a.y", count=2)])
    assert not select(recipe, {"model": contents}).problems


# -- embeddings -----------------------------------------------------------------------------------

EMBEDDINGS = [
    "model.embed_tokens",
    "embed_image_indicator",
    "transformer.wte",
    "wpe",
    "shared",
    "text.token_embedding",
    "embeddings.position_embeddings",
    "x.pos_embed",
    "block.0.relative_attention_bias",
]
LINEARS = ["t_embedding.mlp_in", "x_embedder", "context_embedder", "time_embedding.linear_1"]


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("pattern", ["**", "re:.*", "{name}*"])
def test_a_wildcard_may_not_quantize_an_embedding(choose: Chooser, name: str, pattern: str) -> None:
    selection = choose([rule(pattern.replace("{name}", name))], parts={"model": [name]})
    problem = one(selection)
    assert (problem.kind, problem.tensor) == ("embedding", name)
    assert problem.pointer == "/rules/0/modules/0"


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_may_be_quantized_by_name(choose: Chooser, name: str) -> None:
    assert not choose([rule(name)], parts={"model": [name]}).problems


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_may_be_protected_by_wildcard(choose: Chooser, name: str) -> None:
    selection = choose([rule("lin")], [keep(f"{name}*")], parts={"model": [name, "lin"]})
    assert not selection.problems


@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_of_a_similar_name_is_none(choose: Chooser, name: str) -> None:
    assert not choose([rule("**")], parts={"model": [name]}).problems


def test_a_wildcard_may_cast_an_embedding(choose: Chooser) -> None:
    schemes = {"a": {"weight": {"format": "float16"}}}
    assert not choose([rule("**")], parts={"model": ["wte"]}, schemes=schemes).problems


# -- properties -----------------------------------------------------------------------------------

PATTERN = st.sampled_from(
    ["**", "layers.**", "layers.{0,1}.**", "layers.*.attention.*", "**.w2", "proj", "absent"]
)
ENTRY = st.lists(PATTERN, min_size=1, max_size=3)


@given(st.lists(ENTRY, min_size=1, max_size=4), st.lists(ENTRY, max_size=3))
def test_a_module_goes_to_the_first_entry_and_pattern_that_matches(
    choose: Chooser, rules: list[list[str]], protected: list[list[str]]
) -> None:
    from quantrecipe.schema.patterns import Patterns

    selection = choose([rule(*each) for each in rules], [keep(*each) for each in protected])
    entries = [(f"/protected/{i}", each) for i, each in enumerate(protected)]
    entries += [(f"/rules/{i}", each) for i, each in enumerate(rules)]
    used: set[tuple[str, int]] = set()
    for name in NAMES:
        expected = next(
            (
                (pointer, index)
                for pointer, patterns in entries
                for index, text in enumerate(patterns)
                if Patterns.compile([text]).matches(name) is not None
            ),
            None,
        )
        taken = selection.taken.get(("model", name))
        assert (taken is None) == (expected is None)
        if taken is not None and expected is not None:
            assert taken.pointer == expected[0]
            assert taken.pattern == dict(entries)[expected[0]][expected[1]]
            used.add(expected)
    # Each pattern takes something, or is named.
    dead = {
        f"{pointer}/modules/{index}"
        for pointer, patterns in entries
        for index in range(len(patterns))
        if (pointer, index) not in used
    }
    named = {p.pointer for p in selection.problems if p.kind == "takes-nothing"}
    assert named == dead
    assert all(problem.kind == "takes-nothing" for problem in selection.problems)
