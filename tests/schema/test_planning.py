"""Recipe and headers to a plan: every refusal, every offset, and nothing that depends on order."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.canonical import canonical_bytes, recipe_digest
from quantrecipe.schema.placement import encode_header
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.planning import METADATA_KEY, check_selection, make_plan
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import recipe_text

SMOOTHING = {"kind": "smoothquant", "alpha": 0.5, "apply": "online", "statistics": "s.safetensors"}
TWO = {"layout": "plain", "parts": {"one": "a", "two": "b"}}
FP8_SOURCE = {"source": {"layout": "fp8-scaled"}}


def smoothed(apply: str = "online", **weight: Any) -> dict[str, Any]:
    fields = weight or {"format": "int8", "granularity": "channel"}
    return {"a": {"weight": fields, "smoothing": SMOOTHING | {"apply": apply}}}


def group(size: int) -> dict[str, Any]:
    return {"a": {"weight": {"format": "int8", "granularity": "group", "group_size": size}}}


def keep(*modules: str, **fields: Any) -> dict[str, Any]:
    return {"modules": list(modules), "dtype": "float32", "reason": "on purpose"} | fields


def brief(problems: tuple[Problem, ...]) -> list[tuple[str, str | None]]:
    return [(problem.kind, problem.pointer) for problem in problems]


def module(plan: Plan, name: str, part: str = "model") -> Any:
    (found,) = [m for m in plan.modules if (m.part, m.name) == (part, name)]
    return found


# -- what is refused ------------------------------------------------------------------------------

Case = tuple[dict[str, Any], Callable[[ModuleType], list[Any]], list[tuple[str, str]]]


def parts_of(*tensors: tuple[str, str, tuple[int, ...]]) -> Callable[[ModuleType], list[Any]]:
    """One part of these tensors."""
    return lambda h: [h.source(*(h.tensor(name, dtype, *shape) for name, dtype, shape in tensors))]


X = ("x.weight", "bfloat16", (6, 4))
Y = ("y.weight", "bfloat16", (6, 4))
X8, X8_SCALE = ("x.weight", "float8_e4m3fn", (6, 4)), ("x.weight_scale", "float32", (6,))
XI, XI_SCALE = ("x.weight", "int8", (6, 4)), ("x.weight_scale", "float32", (6, 1))

REFUSED: dict[str, Case] = {
    "a rule takes nothing": (
        {"rules": ["x", "z"]},
        parts_of(X),
        [("takes-nothing", "/rules/1/modules/0")],
    ),
    "a protected entry takes nothing": (
        {"protected": [keep("z")]},
        parts_of(X),
        [("takes-nothing", "/protected/0/modules/0")],
    ),
    "a count that does not hold": (
        {"rules": [{"modules": ["**"], "scheme": "a", "count": 2}]},
        parts_of(X),
        [("count", "/rules/0/count")],
    ),
    "an embedding": (
        {},
        parts_of(X, ("wte.weight", "bfloat16", (9, 4))),
        [("embedding", "/rules/0/modules/0")],
    ),
    "a group size that does not divide": (
        {"schemes": group(3)},
        parts_of(X),
        [("shape-refused", "/rules/0")],
    ),
    "an empty weight": (
        {},
        parts_of(("x.weight", "bfloat16", (0, 4))),
        [("shape-refused", "/rules/0")],
    ),
    "an empty weight, kept as it is": (
        {"rules": ["y"], "target": {"layout": "fp8-scaled", "passthrough_dtype": "keep"}}
        | FP8_SOURCE
        | {"schemes": {"a": {"weight": {"format": "float16"}}}},
        parts_of(Y, ("x.weight", "float8_e4m3fn", (0, 4)), ("x.weight_scale", "float32", (0,))),
        [("shape-refused", "/target/passthrough_dtype")],
    ),
    "a format that the target cannot hold": (
        {"target": {"layout": "plain"}},
        parts_of(X),
        [("target-cannot-hold", "/schemes/a/weight")],
    ),
    "a granularity that the target cannot hold": (
        {"target": {"layout": "transformerlab"}, "schemes": group(2)},
        parts_of(X),
        [("target-cannot-hold", "/schemes/a/weight")],
    ),
    "smoothing without a place": (
        {
            "target": {"layout": "fp8-scaled"},
            "schemes": smoothed(format="float8_e4m3fn", granularity="channel"),
        },
        parts_of(X),
        [("target-cannot-hold", "/schemes/a/smoothing")],
    ),
    "smoothing of a plain format": (
        {"schemes": smoothed(format="float16")},
        parts_of(X),
        [("target-cannot-hold", "/schemes/a/smoothing")],
    ),
    "folding": (
        {"schemes": smoothed("fold")},
        parts_of(X),
        [("fold-without-edge", "/schemes/a/smoothing/apply")],
    ),
    "a stored format that the target cannot keep": (
        {"rules": ["y"], "target": {"layout": "int8-scaled", "passthrough_dtype": "keep"}}
        | FP8_SOURCE,
        parts_of(X8, X8_SCALE, Y),
        [("target-cannot-hold", "/target/passthrough_dtype")],
    ),
    "parts that share a file": (
        {"source": TWO},
        lambda h: [h.source(h.linear("x", 6, 4), name=name) for name in ("one", "two")],
        [("parts-share-file", "/target")],
    ),
    "one file as two parts": (
        {"source": TWO, "target": {"layout": "transformerlab"}},
        lambda h: h.shared(["one", "two"], h.linear("x", 6, 4), h.linear("y", 6, 4)),
        [("shared-tensor", "/source/parts")],
    ),
    "a tensor of no part": (
        {"source": {"layout": "transformerlab"}},
        parts_of(("model.x.weight", "bfloat16", (6, 4)), ("stray", "bfloat16", (6,))),
        [("unowned-tensor", "/source/parts")],
    ),
    "a part without modules": (
        {"source": TWO, "target": {"layout": "transformerlab"}},
        lambda h: [
            h.source(h.linear("x", 6, 4), name="one"),
            h.source(h.tensor("conv.weight", "bfloat16", 2, 2, 3, 3), name="two"),
        ],
        [("no-modules", "/source/layout")],
    ),
    "an other tensor that would be taken for a scale": (
        {},
        parts_of(X, ("y.weight_scale", "bfloat16", (4,))),
        [("misread", "/target/layout")],
    ),
    "an other tensor that would be taken for smoothing": (
        {},
        parts_of(X, ("x.smoothing", "float32", (4,))),
        [("misread", "/target/layout")],
    ),
    "an other tensor in the place of a scale": (
        {},
        parts_of(X, ("x.weight_scale", "bfloat16", (4,))),
        [("name-collision", "/target/layout")],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_where_it_is_asked_for(headers: ModuleType, case: str) -> None:
    changes, make, expected = REFUSED[case]
    problems = headers.problems(headers.recipe(**changes), *make(headers))
    assert brief(problems) == expected
    for problem in problems:
        assert problem.hint or problem.kind == "misread"
        assert_points_somewhere(headers.recipe(**changes), problem)


def assert_points_somewhere(recipe: Recipe, problem: Problem) -> None:
    """The pointer is into the recipe, or at a field that was left out of it."""
    value: Any = recipe.model_dump(mode="json", by_alias=True)
    for token in (problem.pointer or "").removeprefix("/").split("/"):
        value = value[int(token)] if isinstance(value, list) else value[token]


def test_everything_is_refused_at_once(headers: ModuleType) -> None:
    recipe = headers.recipe(
        source={"layout": "fp8-scaled", "parts": {"one": "a", "two": "b"}},
        schemes=group(3) | {"b": smoothed("fold")["a"]},
        rules=["x", "typo", {"modules": ["y"], "scheme": "b", "count": 7}],
        protected=[keep("nothing")],
        target={"layout": "int8-scaled"},
    )
    one = headers.source(
        headers.linear("x", 6, 4), headers.linear("y", 6, 4), headers.linear("z", 6, 4, "int8"),
        name="one",
    )  # fmt: skip
    two = headers.source(headers.linear("w", 6, 4, "float8_e4m3fn"), name="two")
    assert brief(headers.problems(recipe, one, two)) == [
        ("unscaled", None),
        ("missing-scale", None),
        ("takes-nothing", "/protected/0/modules/0"),
        ("takes-nothing", "/rules/1/modules/0"),
        ("count", "/rules/2/count"),
        ("shape-refused", "/rules/0"),
        ("fold-without-edge", "/schemes/b/smoothing/apply"),
        ("parts-share-file", "/target"),
    ]
    assert brief(check_selection(recipe, [one, two])) == brief(headers.problems(recipe, one, two))


def test_a_reason_is_told_once_however_many_modules_it_concerns(headers: ModuleType) -> None:
    source = headers.source(*(headers.linear(f"x{index}", 6, 4) for index in range(50)))
    (problem,) = headers.problems(headers.recipe(target={"layout": "plain"}), source)
    assert problem.message == ("layout 'plain' has no place for int8 (50 modules, the first named)")
    assert problem.tensor == "x0"


def test_a_bias_without_a_place(headers: ModuleType) -> None:
    custom = headers.layout()
    del custom["modules"]["int8"]["bias"]
    recipe = headers.recipe(target={"layout": custom})
    x, bias = headers.linear("x", 6, 4), headers.tensor("x.bias", "bfloat16", 6)
    assert not headers.problems(recipe, headers.source(x))
    (problem,) = headers.problems(recipe, headers.source(x, bias))
    assert (problem.kind, problem.pointer) == ("target-cannot-hold", "/target/layout")
    assert "bias" in problem.message


def test_a_layout_that_asks_for_smoothing(headers: ModuleType) -> None:
    custom = headers.layout()
    custom["modules"]["int8"]["smoothing"]["optional"] = False
    source = headers.source(headers.linear("x", 6, 4))
    (problem,) = headers.problems(headers.recipe(target={"layout": custom}), source)
    assert (problem.kind, problem.pointer) == ("target-asks-for-more", "/target/layout")
    recipe = headers.recipe(target={"layout": custom}, schemes=smoothed())
    assert not headers.problems(recipe, source)


def test_names_that_do_not_tell_parts_apart(headers: ModuleType) -> None:
    custom = headers.layout("transformerlab")
    for role in custom["modules"]["int8"].values():
        role["name"] = role["name"].removeprefix("{part}.")
    recipe = headers.recipe(source=TWO, target={"layout": custom})
    parts = [headers.source(headers.linear("x", 6, 4), name=name) for name in ("one", "two")]
    problems = headers.problems(recipe, *parts)
    assert brief(problems) == [("name-collision", "/target/layout")] * 2
    assert problems[0].message == (
        "'x.wq' would be the name of 'x' of part 'one' (weight) and of 'x' of part 'two' (weight)"
    )


def test_a_tensor_may_not_take_the_name_of_the_metadata(headers: ModuleType) -> None:
    tensors = headers.linear("one.x", 6, 4), headers.tensor("one.__metadata__", "bfloat16", 4)
    source = {"layout": "transformerlab", "parts": {"one": "a"}}
    (problem,) = headers.problems(
        headers.recipe(source=source), headers.source(*tensors, name="one")
    )
    assert problem.kind == "name-collision"
    assert "'__metadata__'" in problem.message


def test_shards_may_not_be_called_as_another_file(headers: ModuleType) -> None:
    files = {"one": "m.safetensors", "two": "m-00001-of-00002.safetensors"}
    recipe = headers.recipe(
        source=TWO, target={"layout": "int8-scaled", "parts": files, "max_shard_size": "100B"}
    )
    big = headers.source(headers.linear("x", 6, 10), headers.linear("y", 6, 10), name="one")
    small = headers.source(headers.linear("x", 6, 4), name="two")
    (problem,) = headers.problems(recipe, big, small)
    assert (problem.kind, problem.pointer) == ("duplicate-file", "/target/parts")


def test_activation_scales_are_dropped_with_a_word(headers: ModuleType) -> None:
    tensors = [each for name in "xyz" for each in headers.fp8(name, 6, 4)]
    tensors += [headers.tensor(f"{name}.input_scale", "float32") for name in "xz"]
    plan = make_plan(headers.recipe(**FP8_SOURCE), [headers.source(*tensors)])
    (warning,) = plan.warnings
    assert warning.kind == "input-scale-dropped"
    assert "(2 modules, the first named)" in warning.message
    assert warning.tensor == "x.input_scale"
    assert not any("input_scale" in tensor.name for tensor in plan.tensors())


# -- what passes through --------------------------------------------------------------------------

PASSED = [
    ("plain stays", "plain", X, None, "float16", "bfloat16", True),
    ("fp8 is dequantized", "fp8-scaled", X8, X8_SCALE, None, "bfloat16", False),
    ("fp8 to float32", "fp8-scaled", X8, X8_SCALE, "float32", "float32", False),
    ("int8 is dequantized", "int8-scaled", XI, XI_SCALE, None, "bfloat16", False),
    ("int8 is kept", "int8-scaled", XI, XI_SCALE, "keep", "int8", True),
]


@pytest.mark.parametrize("case", PASSED, ids=lambda case: case[0])
def test_what_nothing_matches_passes_through(headers: ModuleType, case: Any) -> None:
    _, layout, weight, scale, dtype, expected, copied = case
    target = {"layout": "int8-scaled"} | ({"passthrough_dtype": dtype} if dtype else {})
    recipe = headers.recipe(source={"layout": layout}, rules=["y"], target=target)
    tensors = [headers.tensor(n, d, *s) for n, d, s in (weight, scale, Y) if n] if scale else [
        headers.tensor(n, d, *s) for n, d, s in (weight, Y)
    ]  # fmt: skip
    plan = make_plan(recipe, [headers.source(*tensors)])
    found = module(plan, "x")
    assert (found.disposition, found.weight.format) == ("passthrough", expected)
    assert found.carried is copied
    assert (found.pointer, found.pattern, found.scheme, found.reason) == (None, None, None, None)
    assert set(found.outputs) == ({"weight", "weight_scale"} if dtype == "keep" else {"weight"})


def test_a_kept_scale_gets_the_targets_shape_and_the_same_bytes(headers: ModuleType) -> None:
    recipe = headers.recipe(
        source={"layout": "int8-scaled"},
        rules=["y"],
        target={"layout": "transformerlab", "passthrough_dtype": "keep"},
    )
    tensors = [headers.tensor(n, d, *s) for n, d, s in (XI, XI_SCALE, Y)]
    scale = module(make_plan(recipe, [headers.source(*tensors)]), "x").outputs["weight_scale"]
    assert (scale.name, scale.shape, scale.nbytes) == ("model.x.ws", (6,), 24)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_protected_module_is_stored_in_its_dtype(headers: ModuleType, dtype: str) -> None:
    recipe = headers.recipe(**FP8_SOURCE, protected=[keep("x", dtype=dtype)])
    source = headers.source(*headers.fp8("x", 6, 4), headers.linear("y", 6, 4))
    found = module(make_plan(recipe, [source]), "x")
    assert (found.disposition, found.reason) == ("protected", "on purpose")
    assert (found.pointer, found.pattern) == ("/protected/0", "x")
    assert found.outputs["weight"].dtype == dtype
    assert set(found.outputs) == {"weight"}


def test_a_quantized_module_says_all_about_itself(headers: ModuleType) -> None:
    schemes = smoothed()
    schemes["a"]["activation"] = {"format": "int8", "granularity": "token", "dynamic": True}
    recipe = headers.recipe(schemes=schemes)
    bias = headers.tensor("x.bias", "float16", 6)
    statistics = {"s.safetensors": Path("s.safetensors")}
    plan = make_plan(recipe, [headers.source(headers.linear("x", 6, 4), bias)], statistics)
    found = module(plan, "x")
    assert (found.disposition, found.scheme) == ("quantized", "a")
    assert (found.pointer, found.pattern) == ("/rules/0", "**")
    assert found.activation == recipe.schemes["a"].activation
    assert found.smoothing == recipe.schemes["a"].smoothing
    assert {role: (t.name, t.dtype, t.shape) for role, t in found.outputs.items()} == {
        "weight": ("x.weight", "int8", (6, 4)),
        "weight_scale": ("x.weight_scale", "float32", (6, 1)),
        "smoothing": ("x.smoothing", "float32", (4,)),
        "bias": ("x.bias", "float16", (6,)),
    }
    assert not found.carried
    assert plan.statistics == statistics


# -- files ----------------------------------------------------------------------------------------


def assert_sound(plan: Plan, headers: ModuleType) -> None:
    """Offsets and sizes are those that the header says, and everything has exactly one place."""
    placed = list(plan.tensors())
    assert len({(tensor.file, tensor.name) for tensor in placed}) == len(placed)
    by_file = {file.path: file for file in plan.files}
    for file in plan.files:
        length = int.from_bytes(file.header[:8], "little")
        assert len(file.header) == 8 + length
        entries = json.loads(file.header[8:])
        metadata = entries.pop("__metadata__")
        assert file.header == encode_header(list(file.tensors.values()), metadata)
        mine = {tensor.name: tensor for tensor in placed if tensor.file == file.path}
        assert entries.keys() == mine.keys() == file.tensors.keys()
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            assert mine[name].offset == len(file.header) + begin
            assert mine[name].nbytes == end - begin
            assert tuple(entry["shape"]) == mine[name].shape
        assert file.size == len(file.header) + sum(tensor.nbytes for tensor in mine.values())
    assert {tensor.file for tensor in placed} <= by_file.keys()
    assert plan.output_bytes == sum(file.size for file in plan.files)
    read = sum(m.source.nbytes for m in plan.modules) + sum(o.source.nbytes for o in plan.others)
    assert plan.source_bytes == read


def test_parts_go_into_files_of_their_own(headers: ModuleType) -> None:
    files = {"one": "a/x.safetensors", "two": "b/y.safetensors"}
    recipe = headers.recipe(source=TWO, target={"layout": "int8-scaled", "parts": files})
    norm = headers.tensor("norm.weight", "bfloat16", 4)
    parts = [headers.source(headers.linear("x", 6, 4), norm, name=name) for name in ("one", "two")]
    plan = make_plan(recipe, parts)
    assert [file.path for file in plan.files] == ["a/x.safetensors", "b/y.safetensors"]
    for file in plan.files:
        assert set(file.tensors) == {"x.weight", "x.weight_scale", "norm.weight"}
    assert {(other.part, other.output.file) for other in plan.others} == set(files.items())
    assert_sound(plan, headers)


def test_parts_go_into_one_file_where_names_tell_them_apart(headers: ModuleType) -> None:
    recipe = headers.recipe(
        source=TWO, target={"layout": "transformerlab", "file": "m.safetensors"}
    )
    parts = [headers.source(headers.linear("x", 6, 4), name=name) for name in ("one", "two")]
    plan = make_plan(recipe, parts)
    (file,) = plan.files
    assert set(file.tensors) == {"one.x.wq", "one.x.ws", "two.x.wq", "two.x.ws"}
    assert_sound(plan, headers)


def test_one_file_of_two_parts_goes_into_two(headers: ModuleType) -> None:
    parts = {"one": "m.safetensors", "two": "m.safetensors"}
    recipe = headers.recipe(
        source={"layout": "transformerlab", "parts": parts},
        target={"layout": "plain", "parts": {"one": "1.safetensors", "two": "2.safetensors"}},
        schemes={"a": {"weight": {"format": "float16"}}},
    )
    tensors = [headers.linear("one.x", 6, 4), headers.linear("two.x", 8, 4)]
    plan = make_plan(recipe, headers.shared(["one", "two"], *tensors))
    assert [file.tensors["x.weight"].shape for file in plan.files] == [(6, 4), (8, 4)]
    assert len(plan.source_files) == 1


def test_shards_keep_modules_together_and_have_an_index(headers: ModuleType) -> None:
    tensors = [headers.linear(f"x.{index}", 8, 8) for index in range(5)]
    tensors += [headers.tensor("norm.weight", "bfloat16", 4)]
    recipe = headers.recipe(
        target={"layout": "int8-scaled", "file": "d/m.safetensors", "max_shard_size": "170B"}
    )
    plan = make_plan(recipe, [headers.source(*tensors)])
    # 64 bytes of codes and 32 of scales: the codes of a second module alone would still fit in.
    names = [f"d/m-{number:05d}-of-00005.safetensors" for number in range(1, 6)]
    assert [file.path for file in plan.files] == names
    for each in plan.modules:
        assert len({tensor.file for tensor in each.outputs.values()}) == 1
    assert list(plan.extra_files) == ["d/m.safetensors.index.json"]
    index = json.loads(plan.extra_files["d/m.safetensors.index.json"])
    assert index["weight_map"] == {
        tensor.name: tensor.file.removeprefix("d/") for tensor in plan.tensors()
    }
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in plan.tensors())
    assert_sound(plan, headers)


# -- metadata -------------------------------------------------------------------------------------


def metadata(plan: Plan, place: int = 0) -> dict[str, str]:
    header = plan.files[place].header
    found: dict[str, str] = json.loads(header[8:])["__metadata__"]
    return found


def test_a_file_explains_itself(headers: ModuleType) -> None:
    recipe = headers.recipe()
    source = headers.source(headers.linear("x", 6, 4), metadata={"author": "someone"})
    found = metadata(make_plan(recipe, [source]))
    assert found.keys() == {"author", "format", METADATA_KEY}
    assert (found["author"], found["format"]) == ("someone", "pt")
    said = json.loads(found[METADATA_KEY])
    assert said == {
        "recipe": recipe.to_json_value(),
        "recipe_sha256": recipe_digest(recipe),
        "version": 1,
    }
    assert found[METADATA_KEY].encode() == canonical_bytes(said)
    assert Recipe.model_validate_json(json.dumps(said["recipe"])) == recipe


def two_parts(headers: ModuleType, one: dict[str, str], two: dict[str, str]) -> dict[str, str]:
    recipe = headers.recipe(source=TWO, target={"layout": "transformerlab"})
    parts = [
        headers.source(headers.linear("x", 6, 4), name=name, metadata=said)
        for name, said in (("one", one), ("two", two))
    ]
    found = metadata(make_plan(recipe, parts))
    # The order of parts is not the recipe's: JSON objects have none.
    assert metadata(make_plan(recipe, parts[::-1])) == found
    return {key: value for key, value in found.items() if key != METADATA_KEY}


METADATA = [
    ("alike", {"k": "1"}, {"k": "1"}, {"k": "1"}),
    ("one only", {"k": "1"}, {}, {"k": "1"}),
    ("the other only", {}, {"k": "1"}, {"k": "1"}),
    ("in conflict", {"k": "1", "l": "x"}, {"k": "2"}, {"one.k": "1", "two.k": "2", "l": "x"}),
    ("a conversion before", {METADATA_KEY: "1"}, {METADATA_KEY: "2"}, {}),
    ("the target's word counts", {"format": "tf"}, {"format": "np"}, None),
]


@pytest.mark.parametrize("case", METADATA, ids=lambda case: case[0])
def test_metadata_of_parts_in_one_file(headers: ModuleType, case: Any) -> None:
    _, one, two, expected = case
    if expected is None:
        expected = {"one.format": "tf", "two.format": "np"}
    assert two_parts(headers, one, two) == {"format": "pt"} | expected


def test_metadata_of_shards_in_conflict(headers: ModuleType) -> None:
    files = [
        headers.file(f"{name}.safetensors", [headers.linear(name, 6, 4)], {"k": name, "same": "1"})
        for name in "xy"
    ]
    plan = make_plan(headers.recipe(), [headers.part("model", *files)])
    found = metadata(plan)
    assert (found["k"], found["same"]) == ("x", "1")
    (warning,) = plan.warnings
    assert (warning.kind, warning.file) == ("metadata-conflict", "y.safetensors")


def test_what_the_sources_layout_says_of_itself_is_not_carried_over(headers: ModuleType) -> None:
    source = {"layout": headers.layout("plain", metadata={"made_of": "plain", "format": "pt"})}
    said = {"made_of": "plain", "format": "pt", "author": "someone"}
    x = headers.source(headers.linear("x", 6, 4), metadata=said)
    found = metadata(make_plan(headers.recipe(source=source), [x]))
    assert found.keys() == {"author", "format", METADATA_KEY}


# -- properties -----------------------------------------------------------------------------------

KINDS = st.sampled_from(["bfloat16", "float32", "fp8", "norm", "conv"])
MODEL = st.dictionaries(
    st.lists(st.sampled_from(["a", "b", "10", "9"]), min_size=1, max_size=3).map(".".join),
    st.tuples(KINDS, st.integers(1, 9), st.integers(1, 9)),
    min_size=1,
    max_size=8,
)


def tensors_of(headers: ModuleType, drawn: dict[str, tuple[str, int, int]]) -> list[Any]:
    found: list[Any] = [headers.linear("always", 4, 4)]
    for name, (kind, out, inn) in drawn.items():
        if kind == "fp8":
            found += headers.fp8(name, out, inn)
        elif kind == "norm":
            found.append(headers.tensor(f"{name}.weight", "float32", inn))
        elif kind == "conv":
            found.append(headers.tensor(f"{name}.weight", "float16", out, inn, 3, 3))
        else:
            found.append(headers.linear(name, out, inn, kind))
    return found


@given(MODEL, st.randoms(use_true_random=False), st.sampled_from([None, "64B", "300B", "1GB"]))
def test_a_plan_is_sound_and_depends_on_no_order(
    headers: ModuleType, drawn: dict[str, Any], random: Any, size: str | None
) -> None:
    tensors = tensors_of(headers, drawn)
    recipe = headers.recipe(
        source={"layout": "fp8-scaled", "parts": {"one": "a", "two": "b"}},
        rules=["**"],
        protected=[keep("a.**", count={"min": 0})],
        target={"layout": "transformerlab"} | ({"max_shard_size": size} if size else {}),
    )
    parts = [headers.source(*tensors, name=name) for name in ("one", "two")]
    plan = make_plan(recipe, parts)
    assert_sound(plan, headers)
    assert [(m.part, m.name) for m in plan.modules] == sorted(
        (m.part, m.name) for m in plan.modules
    )
    assert [(o.part, o.name) for o in plan.others] == sorted((o.part, o.name) for o in plan.others)
    # Every tensor of the source becomes something, or a scale that a new one takes the place of.
    names = {f"{name}.weight" for name in drawn} | {"always.weight"}
    read = {info.name for m in plan.modules for info in m.source.tensors.values()}
    read |= {other.source.name for other in plan.others}
    assert {tensor.name for tensor in tensors} == read
    assert names <= read
    random.shuffle(tensors)
    again = make_plan(recipe, [headers.source(*tensors, name=name) for name in ("two", "one")])
    assert again.files == plan.files
    assert again.extra_files == plan.extra_files
    assert [m.outputs for m in again.modules] == [m.outputs for m in plan.modules]
    assert [o.output for o in again.others] == [o.output for o in plan.others]


@given(MODEL)
def test_refusals_depend_on_no_order(headers: ModuleType, drawn: dict[str, Any]) -> None:
    tensors = tensors_of(headers, drawn)
    recipe = headers.recipe(
        source={"layout": "plain"}, schemes=group(4), target={"layout": "plain"}
    )
    first = headers.problems(recipe, headers.source(*tensors))
    assert first
    assert first == headers.problems(recipe, headers.source(*tensors[::-1]))


# -- Ideogram 4 in full size ----------------------------------------------------------------------

BRANCHES = ("conditional", "unconditional")
PROTECTED = {"ideogram-4-int8-w8a8": 2 * 58, "ideogram-4-int8-w8a8-published": 2 * 17}


@pytest.mark.parametrize("name", PROTECTED)
def test_ideogram_4_is_planned_in_full_size(
    headers: ModuleType, ideogram4: ModuleType, name: str
) -> None:
    recipe = Recipe.model_validate_json(recipe_text(name))
    tensors = list(ideogram4.tensors(fp8=True))
    parts = [headers.source(*tensors, name=branch) for branch in BRANCHES]
    start = time.process_time()
    plan = make_plan(recipe, parts, {"statistics.safetensors": Path("statistics.safetensors")})
    # Half a second on an idle machine; what grows with the square of the model takes minutes.
    assert time.process_time() - start < 20
    assert_sound(plan, headers)
    # 211 linears and the embedding; norms are no modules.
    found = Counter((m.part, m.disposition) for m in plan.modules)
    for branch in BRANCHES:
        assert found[branch, "passthrough"] == 1
        assert found[branch, "protected"] == PROTECTED[name] // 2
        assert found[branch, "quantized"] == 211 - PROTECTED[name] // 2
    assert len(plan.others) == 2 * (len(ideogram4.other_shapes()) - 1)
    assert plan.source_bytes == 2 * sum(tensor.nbytes for tensor in tensors)
    (file,) = plan.files
    expected = 0
    for branch in BRANCHES:
        kept = {m.name for m in plan.modules if m.part == branch and m.disposition == "protected"}
        for linear in ideogram4.linears():
            numbers = linear.out_features * linear.in_features
            bias = 2 * linear.out_features if linear.bias else 0
            if linear.name in kept:
                expected += 2 * numbers + bias
            else:
                smooth = 4 * linear.in_features if name.endswith("published") else 0
                expected += numbers + 4 * linear.out_features + smooth + bias
        for shape in ideogram4.other_shapes().values():
            expected += 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert file.size - len(file.header) == expected
