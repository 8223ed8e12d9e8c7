"""What a target calls the modules of a source: other names, slices of rows, and rows together."""

from __future__ import annotations

import json
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.layout_reading import PartContents, read_part
from quantrecipe.schema.names import NameMapping
from quantrecipe.schema.planning import make_plan
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.registry import named_layout
from quantrecipe.schema.renaming import renamed

SPLIT = {
    "from": "layers.*.attention.qkv",
    "into": [f"layers.*.attention.to_{which}" for which in "qkv"],
}
RENAME = {"from": "layers.*.attention.o", "into": "layers.*.attention.to_out.0"}


def mappings(*names: Any) -> tuple[NameMapping, ...]:
    return tuple(NameMapping.model_validate_json(json.dumps(each)) for each in names)


class Namer:
    """Reads tensors as a source, and calls them by these names."""

    def __init__(self, headers: ModuleType) -> None:
        self.headers = headers

    def __call__(self, tensors: Any, *names: Any, source: str = "plain") -> PartContents:
        part = self.headers.source(*tensors)
        return renamed(read_part(named_layout(source), part), mappings(*names))


@pytest.fixture(scope="session")
def named(headers: ModuleType) -> Namer:
    return Namer(headers)


def only(problems: tuple[Problem, ...]) -> Problem:
    assert len(problems) == 1, problems
    return problems[0]


@given(rows=st.integers(1, 50), columns=st.integers(1, 9), pieces=st.integers(1, 6))
def test_slices_lie_one_after_the_other_where_the_whole_does(
    named: Namer, rows: int, columns: int, pieces: int
) -> None:
    tensors = [*named.headers.fp8("a.qkv", rows * pieces, columns)]
    tensors += [named.headers.tensor("a.qkv.bias", "bfloat16", rows * pieces)]
    whole = {tensor.name: tensor for tensor in tensors}
    into = [f"*.p{index}" for index in range(pieces)]
    names = {"from": "*.qkv", "into": into if pieces > 1 else into[0]}
    contents = named(tensors, names, source="fp8-scaled")
    assert not contents.problems
    assert list(contents.modules) == [f"a.p{index}" for index in range(pieces)]
    roles = {"weight": "a.qkv.weight", "weight_scale": "a.qkv.weight_scale", "bias": "a.qkv.bias"}
    for role, name in roles.items():
        slices = [module.tensors[role] for module in contents.modules.values()]
        assert {one.name for one in slices} == {name}
        assert sum(one.nbytes for one in slices) == whole[name].nbytes
        for one, after in pairwise(slices):
            assert one.offset + one.nbytes == after.offset
        assert {one.shape for one in slices} == {(rows, *whole[name].shape[1:])}
    for module in contents.modules.values():
        assert (module.out_features, module.in_features) == (rows, columns)
        assert module.renamed_from == ("a.qkv",)


def test_names_are_carried_over_segment_by_segment(named: Namer) -> None:
    headers = named.headers
    names = ["layers.0.attention.qkv", "layers.x.attention.qkv", "x.layers.0.attention.qkv"]
    tensors = [headers.linear(name, 6, 4) for name in [*names, "layers.1.attention.o", "end"]]
    contents = named(tensors, SPLIT, RENAME)
    assert list(contents.modules) == [
        "end",
        *(f"layers.0.attention.to_{which}" for which in "kqv"),
        "layers.1.attention.to_out.0",
        *(f"layers.x.attention.to_{which}" for which in "kqv"),
        "x.layers.0.attention.qkv",
    ]
    assert contents.modules["end"].renamed_from == ()
    assert contents.renamed["layers.1.attention.o"] == ("layers.1.attention.to_out.0",)


def test_wildcards_keep_their_order(named: Namer) -> None:
    tensors = [named.headers.linear("a.b.c", 2, 2)]
    contents = named(tensors, {"from": "*.*.c", "into": "x.*.y.*"})
    assert list(contents.modules) == ["x.a.y.b"]


def test_the_first_entry_that_fits_counts(named: Namer) -> None:
    tensors = [named.headers.linear(name, 2, 2) for name in ("a.b", "a.c")]
    names = [{"from": "a.b", "into": "first"}, {"from": "a.*", "into": "second.*"}]
    assert list(named(tensors, *names).modules) == ["first", "second.c"]


def test_names_may_change_places(named: Namer) -> None:
    tensors = [named.headers.linear("a", 2, 3), named.headers.linear("b", 4, 5)]
    contents = named(tensors, {"from": "a", "into": "b"}, {"from": "b", "into": "a"})
    assert not contents.problems
    assert {name: m.out_features for name, m in contents.modules.items()} == {"a": 4, "b": 2}


def test_what_has_the_names_already_stays(named: Namer) -> None:
    tensors = [named.headers.linear(f"layers.0.attention.to_{which}", 2, 2) for which in "qkv"]
    before = read_part(named_layout("plain"), named.headers.source(*tensors))
    contents = named(tensors, SPLIT, RENAME)
    assert contents.modules == before.modules
    assert not contents.renamed


def test_other_tensors_go_with_their_owner_or_by_their_own_name(named: Namer) -> None:
    headers = named.headers
    tensors = [
        headers.linear("x", 2, 2),
        headers.tensor("old.norm.weight", "bfloat16", 4),
        headers.tensor("table", "bfloat16", 4),
        headers.tensor("norm.weight", "bfloat16", 4),
    ]
    names = [{"from": "old.*", "into": "new.*"}, {"from": "table", "into": "a.table"}]
    assert list(named(tensors, *names).others) == ["a.table", "new.norm.weight", "norm.weight"]


@pytest.mark.parametrize(
    ("shape", "shared"), [((), True), ((1,), True), ((12,), False), ((12, 1), False)]
)
def test_a_scale_for_the_whole_weight_is_shared(
    named: Namer, shape: tuple[int, ...], shared: bool
) -> None:
    tensors = [
        named.headers.linear("qkv", 12, 4, "int8"),
        named.headers.tensor("qkv.weight_scale", "float32", *shape),
    ]
    contents = named(tensors, {"from": "qkv", "into": ["q", "k", "v"]}, source="int8-scaled")
    offsets = {module.tensors["weight_scale"].offset for module in contents.modules.values()}
    assert len(offsets) == (1 if shared else 3)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (130 * 3, "parts of 130 rows begin inside blocks of 128 rows that share a scale"),
        (128 * 3 + 1, "its 385 rows cannot be cut into 3 equal parts"),
    ],
)
def test_blocks_that_would_be_cut_are_refused(named: Namer, rows: int, said: str) -> None:
    tensors = [
        named.headers.linear("qkv", rows, 256, "float8_e4m3fn"),
        named.headers.tensor("qkv.weight_scale", "float32", -(-rows // 128), 2),
    ]
    split = {"from": "qkv", "into": ["q", "k", "v"]}
    contents = named(tensors, split, source="fp8-scaled")
    problem = only(contents.problems)
    assert (problem.kind, problem.tensor) == ("cannot-split", "qkv.weight")
    assert said in problem.message
    assert contents.broken == {"q", "k", "v"}


def test_whole_blocks_are_split(named: Namer) -> None:
    tensors = [
        named.headers.linear("qkv", 256 * 3, 130, "float8_e4m3fn"),
        named.headers.tensor("qkv.weight_scale", "float32", 6, 2),
    ]
    contents = named(tensors, {"from": "qkv", "into": ["q", "k", "v"]}, source="fp8-scaled")
    assert not contents.problems
    assert [contents.modules[name].tensors["weight_scale"].shape for name in "qkv"] == [(2, 2)] * 3


def test_what_is_no_module_is_not_split(named: Namer) -> None:
    tensors = [
        named.headers.tensor("c_attn.weight", "bfloat16", 4, 12),
        named.headers.tensor("c_attn.bias", "bfloat16", 12),
        named.headers.linear("x", 2, 2),
    ]
    contents = named(tensors, {"from": "c_attn", "into": ["q", "k", "v"]})
    assert [problem.kind for problem in contents.problems] == ["cannot-split"] * 2
    assert "'c_attn.bias' is not a module's" in contents.problems[0].message


@pytest.mark.parametrize("both", ["modules", "others"])
def test_a_name_that_is_there_already_is_an_error(named: Namer, both: str) -> None:
    headers = named.headers
    tensors = [headers.linear("old", 2, 2), headers.linear("new", 2, 2)]
    if both == "others":
        tensors = [headers.tensor(f"{name}.weight", "bfloat16", 2) for name in ("old", "new")]
    problem = only(named(tensors, {"from": "old", "into": "new"}).problems)
    assert problem.kind == "name-conflict"
    assert "'old" in problem.message
    assert "'new" in problem.message


def test_rules_speak_of_the_new_names(headers: ModuleType) -> None:
    tensors = [headers.linear("layers.0.attention.qkv", 6, 4), headers.linear("x", 2, 2)]
    target = {"layout": "int8-scaled", "names": [SPLIT]}
    recipe = headers.recipe(rules=["layers.*.attention.to_{q,k,v}"], target=target)
    plan = make_plan(recipe, [headers.source(*tensors)])
    taken = {m.name: m.outputs["weight"].shape for m in plan.modules if m.scheme is not None}
    assert taken == {f"layers.0.attention.to_{which}": (2, 4) for which in "qkv"}
    assert plan.source_bytes == sum(tensor.nbytes for tensor in tensors)


def test_a_pattern_for_an_old_name_is_told_the_new_ones(headers: ModuleType) -> None:
    tensors = [headers.linear("layers.0.attention.qkv", 6, 4), headers.linear("x", 2, 2)]
    target = {"layout": "int8-scaled", "names": [SPLIT]}
    recipe = headers.recipe(rules=["x", "layers.*.attention.qkv"], target=target)
    problem = only(headers.problems(recipe, headers.source(*tensors)))
    assert (problem.kind, problem.pointer) == ("takes-nothing", "/rules/1/modules/0")
    assert problem.hint == (
        "target.names calls 'layers.0.attention.qkv' 'layers.0.attention.to_q' and "
        "'layers.0.attention.to_k' and 'layers.0.attention.to_v', and patterns speak of the new "
        "names."
    )


def test_a_split_that_is_refused_is_told_once(headers: ModuleType) -> None:
    names = [{"from": "qkv", "into": ["q", "k", "v"]}]
    target = {"layout": "int8-scaled", "names": names}
    recipe = headers.recipe(rules=["q", "k", "v"], target=target)
    problem = only(headers.problems(recipe, headers.source(headers.linear("qkv", 7, 4))))
    assert problem.kind == "cannot-split"
