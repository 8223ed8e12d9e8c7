"""What a recipe asks of a converter, and what is said of one that cannot do it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from quantrecipe.converter import selection
from quantrecipe.converter.protocol import Converter, Job
from quantrecipe.converter.selection import check_capabilities, converter_names, find_converter
from quantrecipe.schema.capabilities import ANY, Capabilities, missing, needs
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recipe import Recipe

EVERYTHING = {
    "kind": "recipe",
    "version": 1,
    "name": "everything",
    "source": {"layout": "plain"},
    "schemes": {
        "a": {
            "weight": {"format": "int8", "granularity": "group", "group_size": 64},
            "activation": {"format": "int8", "granularity": "token", "dynamic": True},
            "smoothing": {
                "kind": "smoothquant",
                "alpha": 0.5,
                "apply": "online",
                "statistics": "s.safetensors",
            },
        },
        "b": {"weight": {"format": "float16"}},
    },
    "rules": [{"modules": ["x"], "scheme": "a"}, {"modules": ["y"], "scheme": "b"}],
    "protected": [{"modules": ["z"], "dtype": "float32", "reason": "on purpose"}],
    "target": {"layout": "int8-scaled", "passthrough_dtype": "bfloat16"},
}
ABLE = Capabilities(
    schema_versions=frozenset({1}),
    formats={
        "int8": frozenset({"group"}),
        "float16": frozenset(),
        "float32": frozenset(),
        "bfloat16": frozenset(),
    },
    layouts=frozenset({"plain", "int8-scaled"}),
    activations=frozenset({"int8"}),
    smoothing=frozenset({"online"}),
)


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate_json(json.dumps(EVERYTHING | changes))


class Made:
    """A converter that can do just that."""

    name = "made"
    version = "1"

    def __init__(self, capabilities: Capabilities = ABLE) -> None:
        self.capabilities = capabilities

    def convert(self, job: Job) -> None:
        raise NotImplementedError


LAYOUTS = [("plain", "/source/layout"), ("int8-scaled", "/target/layout")]


def test_what_a_recipe_asks_for() -> None:
    assert [(str(need), need.pointer) for need in needs(recipe(), LAYOUTS)] == [
        ("schema version 1", "/version"),
        ("layout plain", "/source/layout"),
        ("layout int8-scaled", "/target/layout"),
        ("format int8 by group", "/schemes/a/weight/format"),
        ("quantizer absmax", "/schemes/a/weight/quantizer"),
        ("activation int8", "/schemes/a/activation/format"),
        ("smoothing online", "/schemes/a/smoothing/apply"),
        ("format float16", "/schemes/b/weight/format"),
        ("format float32", "/protected/0/dtype"),
        ("format bfloat16", "/target/passthrough_dtype"),
    ]


def test_formats_that_are_kept_ask_for_nothing() -> None:
    kept = recipe(target={"layout": "int8-scaled", "passthrough_dtype": "keep"})
    assert "/target/passthrough_dtype" not in [need.pointer for need in needs(kept, LAYOUTS)]


def test_a_converter_that_can_do_it_all_is_let() -> None:
    assert not missing(ABLE, needs(recipe(), LAYOUTS))
    check_capabilities(recipe(), Made())


LACKING: dict[str, tuple[dict[str, Any], str, str]] = {
    "version": ({"schema_versions": frozenset({2})}, "schema version 1", "/version"),
    "source layout": (
        {"layouts": frozenset({"int8-scaled"})},
        "layout plain",
        "/source/layout",
    ),
    "target layout": ({"layouts": frozenset({"plain"})}, "layout int8-scaled", "/target/layout"),
    "format": (
        {"formats": {k: v for k, v in ABLE.formats.items() if k != "int8"}},
        "format int8 by group",
        "/schemes/a/weight/format",
    ),
    "granularity": (
        {"formats": {**ABLE.formats, "int8": frozenset({"channel"})}},
        "format int8 by group",
        "/schemes/a/weight/format",
    ),
    "plain format": (
        {"formats": {k: v for k, v in ABLE.formats.items() if k != "float16"}},
        "format float16",
        "/schemes/b/weight/format",
    ),
    "protected dtype": (
        {"formats": {k: v for k, v in ABLE.formats.items() if k != "float32"}},
        "format float32",
        "/protected/0/dtype",
    ),
    "passthrough dtype": (
        {"formats": {k: v for k, v in ABLE.formats.items() if k != "bfloat16"}},
        "format bfloat16",
        "/target/passthrough_dtype",
    ),
    "activation": (
        {"activations": frozenset({"float8_e4m3fn"})},
        "activation int8",
        "/schemes/a/activation/format",
    ),
    "smoothing": (
        {"smoothing": frozenset({"fold"})},
        "smoothing online",
        "/schemes/a/smoothing/apply",
    ),
    "quantizer": (
        {"quantizers": frozenset[str]()},
        "quantizer absmax",
        "/schemes/a/weight/quantizer",
    ),
}


def refused(wanted: Recipe, converter: Converter) -> tuple[Problem, ...]:
    with pytest.raises(InvalidInput) as caught:
        check_capabilities(wanted, converter)
    return caught.value.problems


@pytest.mark.parametrize("case", LACKING)
def test_what_a_converter_lacks_is_named_and_who_could_do_it(case: str) -> None:
    fields, said, pointer = LACKING[case]
    (problem,) = refused(recipe(), Made(replace(ABLE, **fields)))
    assert (problem.kind, problem.pointer) == ("converter-lacks", pointer)
    assert problem.message == f"converter 'made' has no {said}"
    assert problem.hint is not None
    assert problem.hint.startswith("Could do it: ")
    for name in ("reference", "streaming"):
        assert name in problem.hint


def test_everything_that_is_lacking_is_named_at_once() -> None:
    nothing = Capabilities(frozenset(), {}, frozenset(), quantizers=frozenset())
    problems = refused(recipe(), Made(nothing))
    assert [problem.pointer for problem in problems] == [
        need.pointer for need in needs(recipe(), LAYOUTS)
    ]


def test_nobody_can_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "converter_names", lambda: ["made"])
    (problem,) = refused(recipe(), Made(replace(ABLE, smoothing=frozenset())))
    assert problem.hint is not None
    assert "No installed converter" in problem.hint


def test_any_layout_is_every_layout() -> None:
    check_capabilities(recipe(), Made(replace(ABLE, layouts=ANY)))


@pytest.mark.parametrize("name", ["streaming", "reference"])
def test_our_converters_declare_what_they_can_do(name: str) -> None:
    converter = find_converter(name)
    assert converter.name == name
    assert not missing(converter.capabilities, needs(recipe(), LAYOUTS))
    assert name in converter_names()
