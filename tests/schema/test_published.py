"""The published schemas: frozen, closed, and readable by any validator."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from quantrecipe.schema.base import PATTERN_MEANINGS
from quantrecipe.schema.parsed import MAX_INTEGER
from quantrecipe.schema.published import KINDS, SCHEMAS, generate, published_text, render
from quantrecipe.schema.structure import MODELS, VERSIONS


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema inside a schema."""
    if isinstance(schema, list):
        for entry in schema:
            yield from nodes(entry)
    if isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            if key in ("properties", "$defs"):
                for inner in value.values():
                    yield from nodes(inner)
            elif key not in ("default", "examples", "const", "enum"):
                yield from nodes(value)


@pytest.fixture(params=SCHEMAS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def schema(kind: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(published_text(kind))
    return loaded


def test_the_published_files_say_what_the_models_say(kind: str) -> None:
    assert published_text(kind) == render(generate(kind)), (
        "Run `python -m quantrecipe.schema.published --write`; once a version is released, "
        "its files never change."
    )


def test_there_is_a_schema_for_every_kind() -> None:
    assert set(KINDS) == set(MODELS)
    assert set(VERSIONS.values()) == {1}


def test_they_are_schemas(kind: str, schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == f"urn:quantrecipe:schema:v1:{kind}"
    tag, value = ("kind", kind) if kind in KINDS else ("quant_method", "quantrecipe")
    assert schema["properties"][tag] == {"const": value, "type": "string"} | (
        {} if kind in KINDS else {"description": "Who reads it."}
    )
    assert {tag, "version"} <= set(schema["required"])


def test_every_object_is_closed_or_constrains_its_keys(schema: dict[str, Any]) -> None:
    for node in nodes(schema):
        if node.get("type") == "object":
            closed = node.get("additionalProperties") is False
            assert (
                closed
                or {"propertyNames", "additionalProperties"} <= node.keys()
                or (node["additionalProperties"] == {"type": "string"})
            )


def test_tags_have_no_defaults_and_are_required(schema: dict[str, Any]) -> None:
    for node in nodes(schema):
        for name in ("kind", "format", "granularity", "version"):
            tag = node.get("properties", {}).get(name)
            if tag is not None:
                assert "default" not in tag
                assert name in node["required"]


def test_there_is_no_noise(schema: dict[str, Any]) -> None:
    for node in nodes(schema):
        assert "discriminator" not in node
        assert "title" not in node or node is schema
        assert node.get("default", 0) is not None
        assert "  " not in node.get("description", "")


def test_patterns_mean_the_same_to_every_validator(schema: dict[str, Any]) -> None:
    for node in nodes(schema):
        pattern = node.get("pattern")
        if pattern is None or pattern == r"\n":
            continue
        assert pattern.startswith("^")
        assert pattern.endswith("$")
        assert not re.search(r"\(\?|\\[dDwWsSbBAZz]", pattern)
        assert node["not"] == {"pattern": r"\n"}
        assert pattern in PATTERN_MEANINGS


def test_whole_numbers_stay_exact(schema: dict[str, Any]) -> None:
    for node in nodes(schema):
        if node.get("type") == "integer":
            assert "const" in node or node["maximum"] <= MAX_INTEGER


def test_every_field_of_a_recipe_is_described() -> None:
    schema = json.loads(published_text("recipe"))
    for name, definition in {"Recipe": schema, **schema["$defs"]}.items():
        for field, node in definition.get("properties", {}).items():
            tag = "const" in node or field == "quantizer"
            in_layout = name == "LayoutModules"
            assert tag or in_layout or node.get("description"), f"{name}.{field}"
