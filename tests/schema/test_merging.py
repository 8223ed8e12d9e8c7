"""Modules whose rows become one: where its bytes lie, and what cannot be one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import PartContents, StoredModule, read_part
from quantrecipe.schema.merging import Refusal, merge
from quantrecipe.schema.names import NameMapping
from quantrecipe.schema.planning import make_plan
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.registry import named_layout, resolve_names
from quantrecipe.schema.renaming import new_names, renamed
from quantrecipe.schema.schemes import Hadamard
from quantrecipe.schema.tensors import OutputTensor
from quantrecipe.testing.strategies import layout_of_everything

QKV = NameMapping.model_validate({"from": ("*.q", "*.k", "*.v"), "into": "*.qkv"})
EVERYTHING = layout_of_everything()
PACKED = named_layout("compressed-tensors")


def only(problems: Sequence[Problem]) -> Problem:
    assert len(problems) == 1, problems
    return problems[0]


def merged(
    headers: ModuleType, *tensors: OutputTensor, layout: Layout = EVERYTHING
) -> PartContents:
    return renamed(read_part(layout, headers.source(*tensors)), [QKV])


@given(
    rows=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    columns=st.integers(1, 9),
    scale=st.sampled_from(["[]", "[1]", "[out]", "[out, 1]"]),
    bias=st.booleans(),
)
def test_every_byte_of_the_pieces_is_there_once(
    headers: ModuleType, rows: list[int], columns: int, scale: str, bias: bool
) -> None:
    tensors = []
    for name, out in zip("qkv", rows, strict=True):
        shape = {"[]": (), "[1]": (1,), "[out]": (out,), "[out, 1]": (out, 1)}[scale]
        tensors.append(headers.linear(f"a.{name}", out, columns, "int8"))
        tensors.append(headers.tensor(f"a.{name}.weight_scale", "float32", *shape))
        if bias:
            tensors.append(headers.tensor(f"a.{name}.bias", "bfloat16", out))
    contents = merged(headers, *tensors)
    assert not contents.problems
    (module,) = contents.modules.values()
    assert (module.name, module.renamed_from) == ("a.qkv", ("a.q", "a.k", "a.v"))
    assert (module.out_features, module.in_features) == (sum(rows), columns)
    assert module.weight.model_dump(mode="json")["granularity"] == "channel"
    # Whatever shapes its scales had, they are those of its rows.
    expected = {"weight": (sum(rows), columns), "bias": (sum(rows),)}
    for role, info in module.tensors.items():
        assert [piece.name for piece in info.pieces] == [f"a.{name}.{role}" for name in "qkv"]
        assert info.nbytes == sum(piece.nbytes for piece in info.pieces)
        assert info.shape == expected.get(role, (sum(rows), *info.shape[1:]))
        for piece, out in zip(info.pieces, rows, strict=True):
            stored = next(tensor for tensor in tensors if tensor.name == piece.name)
            assert piece.nbytes == stored.nbytes * piece.times
            assert piece.times == (out if role == "weight_scale" and scale[1:4] != "out" else 1)
    assert contents.claimed == {tensor.name for tensor in tensors}


def test_what_is_merged_already_stays(headers: ModuleType) -> None:
    contents = merged(headers, headers.linear("a.qkv", 6, 4), headers.linear("b", 2, 2))
    assert not contents.problems
    assert not contents.renamed
    assert [m.renamed_from for m in contents.modules.values()] == [(), ()]


def test_pieces_are_found_in_each_place(headers: ModuleType) -> None:
    names = [f"{layer}.{name}" for layer in ("x", "y") for name in "vqk"]
    contents = merged(headers, *(headers.linear(name, 2, 2) for name in names))
    assert not contents.problems
    assert {name: module.renamed_from for name, module in contents.modules.items()} == {
        f"{layer}.qkv": (f"{layer}.q", f"{layer}.k", f"{layer}.v") for layer in ("x", "y")
    }
    assert contents.renamed == {name: (f"{name[0]}.qkv",) for name in names}
    assert new_names("x.k", [QKV]) == ("x.qkv",)


@pytest.mark.parametrize(
    ("there", "said"), [("qv", "has no 'a.k'"), ("k", "has no 'a.q' and no 'a.v'")]
)
def test_missing_pieces_are_named(headers: ModuleType, there: str, said: str) -> None:
    contents = merged(headers, *(headers.linear(f"a.{name}", 2, 2) for name in there))
    problem = only(contents.problems)
    assert (problem.kind, problem.pointer) == ("cannot-merge", "/target/names")
    assert problem.message.startswith("target.names merges 'a.q' and 'a.k' and 'a.v' into 'a.qkv'")
    assert problem.message.endswith(said)
    assert not contents.modules
    assert contents.broken == {"a.qkv"}


def test_a_piece_with_a_problem_of_its_own_is_told_once(headers: ModuleType) -> None:
    tensors = [headers.linear(f"a.{name}", 2, 2) for name in "qk"]
    contents = merged(headers, *tensors, headers.linear("a.v", 2, 2, "int8"))
    assert only(contents.problems).kind == "missing-scale"
    assert contents.broken == {"a.qkv"}


def test_the_whole_beside_its_pieces_is_a_conflict(headers: ModuleType) -> None:
    tensors = [headers.linear(f"a.{name}", 2, 2) for name in ("q", "k", "v", "qkv")]
    problem = only(merged(headers, *tensors).problems)
    assert problem.kind == "name-conflict"
    assert "'a.qkv' and 'a.q' would both be called 'a.qkv'" in problem.message


def test_what_is_no_module_is_not_merged(headers: ModuleType) -> None:
    tensors = [headers.tensor(f"a.{name}.weight", "bfloat16", 4) for name in "qkv"]
    problems = merged(headers, *tensors, headers.linear("b", 2, 2)).problems
    assert [problem.kind for problem in problems] == ["cannot-merge"] * 3
    assert "'a.k.weight' is not a module's" in problems[0].message


def two(headers: ModuleType, kind: str) -> tuple[list[OutputTensor], Layout]:
    """Pieces that cannot be one."""
    tensor, linear = headers.tensor, headers.linear

    def scaled(
        name: str, rows: int, *shape: int, dtype: str = "int8", scale: str = "float32"
    ) -> list[OutputTensor]:
        weight = linear(name, rows, 8, dtype)
        return [weight, tensor(f"{name}.weight_scale", scale, *shape)]

    def packed(name: str, rows: int) -> list[OutputTensor]:
        return [
            tensor(f"{name}.weight_packed", "int32", rows, 8),
            tensor(f"{name}.weight_scale", "float32", rows, 2),
            tensor(f"{name}.weight_zero_point", "int32", -(-rows // 8), 2),
            tensor(f"{name}.weight_shape", "int64", 2),
        ]

    q, k, v = ("a.q", "a.k", "a.v")
    plain = [linear(q, 4, 8), linear(v, 4, 8)]
    of = {
        "inputs": [*plain, linear(k, 4, 6)],
        "formats": [*plain, *scaled(k, 4, 4)],
        "plain dtypes": [*plain, linear(k, 4, 8, "float16")],
        "granularities": [*scaled(q, 4, 4), *scaled(k, 4, 4, 2), *scaled(v, 4, 4)],
        "scale dtypes": [*scaled(q, 4, 4), *scaled(k, 4, 4, scale="float16"), *scaled(v, 4, 4)],
        "a bias of some": [*plain, linear(k, 4, 8), tensor("a.k.bias", "bfloat16", 4)],
        "bias dtypes": [
            *plain,
            linear(k, 4, 8),
            *(tensor(f"{n}.bias", d, 4) for n, d in ((q, "float32"), (v, "float32"))),
            tensor("a.k.bias", "bfloat16", 4),
        ],
        "smoothing": [
            *(each for name in (q, k, v) for each in scaled(name, 4, 4)),
            *(tensor(f"{name}.smoothing", "float32", 8) for name in (q, k, v)),
        ],
        "blocks": [
            each for name in (q, k, v) for each in scaled(name, 5, 2, 2, dtype="float8_e4m3fn")
        ],
        "zero points": [each for name in (q, k, v) for each in packed(name, 12)],
    }
    return of[kind], PACKED if kind == "zero points" else EVERYTHING


REFUSED = {
    "inputs": ("'a.q' and 'a.k' have 8 and 6 input features", "leave these apart"),
    "formats": (
        "'a.q' and 'a.k' are stored differently (format bfloat16; format int8, ",
        "one scheme or one plain dtype for all",
    ),
    "plain dtypes": ("(format bfloat16; format float16)", "one plain dtype"),
    "granularities": ("granularity channel; ", "one scheme"),
    "scale dtypes": ("(scale dtype float32; scale dtype float16)", "one scheme"),
    "a bias of some": ("'a.k' has a bias and 'a.q' has none", "bias of zeros"),
    "bias dtypes": ("the biases of 'a.q' and 'a.k' are float32 and bfloat16", "both biases alike"),
    "smoothing": ("'a.q' is stored with smoothing factors, and headers", "it was made from"),
    "blocks": ("the 5 rows of 'a.q' end inside a block of 3 rows that share a scale", "one scheme"),
    "zero points": ("the 12 rows of 'a.q' end inside a number that holds 8 zero points", "scheme"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_pieces_that_cannot_be_one_are_refused(headers: ModuleType, kind: str) -> None:
    tensors, layout = two(headers, kind)
    contents = merged(headers, *tensors, layout=layout)
    problem = only(contents.problems)
    said, hint = REFUSED[kind]
    assert problem.kind == "cannot-merge"
    assert said in problem.message
    assert problem.hint is not None
    assert hint in problem.hint
    assert contents.broken == {"a.qkv"}


def pieces_of(headers: ModuleType, **changes: Any) -> tuple[StoredModule, StoredModule]:
    """Two int8 modules by channel, the second with these changes."""
    tensors = [headers.linear(name, 4, 8, "int8") for name in "ab"]
    tensors += [headers.tensor(f"{name}.weight_scale", "float32", 4) for name in "ab"]
    first, second = read_part(EVERYTHING, headers.source(*tensors)).modules.values()
    return first, replace(second, **changes)


def test_rotated_pieces_have_one_rotation(headers: ModuleType) -> None:
    rotation = Hadamard(kind="hadamard", size=4)
    found = merge("ab", pieces_of(headers, rotation=rotation))
    assert isinstance(found, Refusal)
    assert "not rotated alike" in found.reason


def test_what_is_of_the_whole_of_a_piece_is_refused(headers: ModuleType) -> None:
    first, second = pieces_of(headers)
    tensors = {**second.tensors, "outliers": second.tensors["weight_scale"]}
    found = merge("ab", [first, replace(second, tensors=tensors)])
    assert isinstance(found, Refusal)
    assert found.reason == "'b' has outliers, of all its rows together"


def test_the_last_piece_may_end_within_a_block(headers: ModuleType) -> None:
    tensors = []
    for name, rows in (("q", 6), ("k", 3), ("v", 5)):
        tensors.append(headers.linear(f"a.{name}", rows, 8, "float8_e4m3fn"))
        tensors.append(headers.tensor(f"a.{name}.weight_scale", "float32", -(-rows // 3), 2))
    contents = merged(headers, *tensors)
    assert not contents.problems
    assert contents.modules["a.qkv"].tensors["weight_scale"].shape == (5, 2)


def test_rules_speak_of_the_whole(headers: ModuleType) -> None:
    tensors = [headers.linear(f"layers.0.attention.to_{name}", 2, 4) for name in "qkv"]
    target = {"layout": "int8-scaled", "names": "ideogram4-original"}
    recipe = headers.recipe(rules=["layers.*.attention.qkv"], target=target)
    plan = make_plan(recipe, [headers.source(*tensors)])
    (module,) = plan.modules
    assert (module.name, module.scheme) == ("layers.0.attention.qkv", "a")
    assert module.outputs["weight"].shape == (6, 4)
    assert plan.names == resolve_names("ideogram4-original")
    assert plan.source_bytes == sum(tensor.nbytes for tensor in tensors)
    wrong = headers.recipe(rules=["layers.*.attention.to_q"], target=target)
    problem = only(headers.problems(wrong, headers.source(*tensors)))
    assert problem.kind == "takes-nothing"
    assert problem.hint is not None
    assert "calls 'layers.0.attention.to_q' 'layers.0.attention.qkv'" in problem.hint


def test_a_merge_that_is_refused_is_told_once(headers: ModuleType) -> None:
    recipe = headers.recipe(
        rules=["ab"],
        target={"layout": "int8-scaled", "names": [{"from": ["a", "b"], "into": "ab"}]},
    )
    source = headers.source(headers.linear("a", 2, 4), headers.linear("b", 2, 5))
    assert only(headers.problems(recipe, source)).kind == "cannot-merge"
