"""Documents nobody wrote: the models and the published schemas still say the same of them."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from quantrecipe.schema.json_text import parse_json
from quantrecipe.schema.known import known_fields
from quantrecipe.schema.published import published_text
from quantrecipe.schema.structure import MODELS, structure_problems
from quantrecipe.schema.validation import validate_value

FOLDER = Path(__file__).parent / "cases"
WORDS = (
    *("recipe", "layout", "int8", "float8_e4m3fn", "bfloat16", "tensor", "channel", "group"),
    *("block", "fold", "online", "absmax", "out", "in", "", "a", "A", "a\n", ".", "..", "a/b"),
    *("x.safetensors", "{module}", "{part}{module}", "{tensor}", "com.example", "5GB", "keep"),
    *("string", "object", "[key]", "kind", "version", "weight", "$schema", "é", "0" * 64),
)
NUMBERS = (0, 1, -1, 2, 1.0, 1.5, 0.5, 1e22, -0.0, 400, 401, 1 << 20, (1 << 53) - 1)
SCALARS = st.sampled_from([*WORDS, *NUMBERS, True, False, None])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3)
    ),
    max_leaves=5,
)


@cache
def _validator(kind: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(published_text(kind)))


@cache
def _valid_documents() -> list[Any]:
    cases = [
        case for path in sorted(FOLDER.glob("*.json")) for case in json.loads(path.read_text())
    ]
    return [case.get("recipe", case.get("document")) for case in cases if case["valid"]]


def _places(value: Any, holder: Any = None, key: Any = None) -> list[tuple[Any, Any]]:
    """Every entry of a value, as what holds it and its key there."""
    found = [] if holder is None else [(holder, key)]
    entries: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        entries = list(value.items() if isinstance(value, dict) else enumerate(value))
    for name, entry in entries:
        found += _places(entry, value, name)
    return found


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A valid document with entries deleted, renamed, replaced, moved or added."""
    document = copy.deepcopy(draw(st.sampled_from(_valid_documents())))
    for _ in range(draw(st.integers(1, 3))):
        places = _places(document)
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["delete", "rename", "replace", "insert", "copy"]))
        if action == "delete":
            del holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(WORDS))] = holder.pop(key)
        elif action == "insert" and isinstance(holder, list):
            holder.insert(key, draw(VALUES))
        elif action == "insert":
            holder[draw(st.sampled_from(WORDS))] = draw(VALUES)
        elif action == "copy":
            other, name = draw(st.sampled_from(places))
            if isinstance(other, dict) and name not in other:
                continue
            if isinstance(other, list) and name >= len(other):
                continue
            holder[key] = copy.deepcopy(other[name])
        else:
            holder[key] = draw(VALUES)
    parsed = parse_json(json.dumps(document))
    assert parsed.complete
    return parsed.value


def _kind(document: Any) -> str:
    kind = document.get("kind") if isinstance(document, dict) else None
    return kind if isinstance(kind, str) and kind in MODELS else "recipe"


@given(mutated())
def test_models_and_schemas_agree(document: Any) -> None:
    kind = _kind(document)
    errors = list(_validator(kind).iter_errors(document))
    problems = structure_problems(document, kind)
    assert bool(errors) == bool(problems), (errors, problems)


@given(mutated())
def test_every_problem_points_into_the_document(document: Any) -> None:
    for problem in validate_value(document, layouts=("plain",), names=()):
        assert problem.pointer is not None
        tokens = [t.replace("~1", "/").replace("~0", "~") for t in problem.pointer.split("/")[1:]]
        value = document
        for token in tokens[:-1]:
            value = value[int(token)] if isinstance(value, list) else value[token]
        if tokens and problem.kind == "missing-field":
            assert tokens[-1] not in value
        elif tokens:
            assert int(tokens[-1]) < len(value) if isinstance(value, list) else tokens[-1] in value


@given(mutated())
def test_whatever_is_valid_comes_back_as_it_was(document: Any) -> None:
    kind = _kind(document)
    if structure_problems(document, kind):
        return
    model = MODELS[kind].model_validate_json(json.dumps(document))
    assert model.to_json_value() == document


def test_suggestions_follow_the_tags_of_a_union() -> None:
    weight = {"format": "int8", "granularity": "group", "size": 3}
    document = {"schemes": {"object": {"weight": weight}}}
    fields = known_fields("recipe", document, ("schemes", "object", "weight"))
    assert "group_size" in fields
    assert "block_size" not in fields
