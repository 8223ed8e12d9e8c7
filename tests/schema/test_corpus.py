"""The shared corpus: the models and the published schemas say the same of every case."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from quantrecipe.schema.json_text import parse_json
from quantrecipe.schema.published import published_text
from quantrecipe.schema.structure import MODELS, structure_problems, tag_problem
from quantrecipe.schema.validation import validate_value

LAYOUTS = ("fp8-scaled", "int8-scaled", "plain", "transformerlab")
NAMES = ("ideogram4-diffusers",)
FOLDER = Path(__file__).parent / "cases"


def _cases() -> list[Any]:
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        parsed = parse_json(path.read_bytes(), path.name)
        assert not parsed.problems, parsed.problems
        assert isinstance(parsed.value, list)
        for case in parsed.value:
            assert isinstance(case, dict)
            found.append(pytest.param(case, id=f"{path.stem}: {case['description']}"))
    return found


CASES = _cases()


@cache
def _validator(kind: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(published_text(kind)))


def _document(case: dict[str, Any]) -> Any:
    return case["recipe"] if "recipe" in case else case["document"]


def _kind(document: Any) -> str:
    """The schema to hold it to: the one that it names, if it names one."""
    kind = document.get("kind") if isinstance(document, dict) else None
    return kind if isinstance(kind, str) and kind in MODELS else "recipe"


def test_the_corpus_is_large_and_every_case_is_told_apart() -> None:
    ids = [case.id for case in CASES]
    assert len(ids) >= 90
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("case", CASES)
def test_every_problem_is_found_in_its_place(case: dict[str, Any]) -> None:
    found = validate_value(_document(case), layouts=LAYOUTS, names=NAMES)
    expected = {(problem["kind"], problem["pointer"]) for problem in case["problems"]}
    assert {(problem.kind, problem.pointer) for problem in found} == expected
    assert len(found) == len(expected)
    assert case["valid"] == (not found)


@pytest.mark.parametrize("case", CASES)
def test_models_and_schemas_agree(case: dict[str, Any]) -> None:
    document = _document(case)
    kind = _kind(document)
    by_schema = _validator(kind).is_valid(document)
    by_model = not structure_problems(document, kind)
    assert by_schema == by_model
    assert by_schema == (case["valid"] or bool(case.get("semantic")))


@pytest.mark.parametrize("case", CASES)
def test_every_message_is_a_sentence_of_our_own(case: dict[str, Any]) -> None:
    for problem in validate_value(_document(case), layouts=LAYOUTS, names=NAMES):
        assert problem.kind != "invalid-value"
        assert "Input should" not in problem.message
        assert problem.hint != "None is known."


def test_what_has_no_tags_is_refused_before_its_structure() -> None:
    problem = tag_problem({"kind": "lock", "version": 1}, "recipe")
    assert problem is not None
    assert (problem.kind, problem.pointer) == ("wrong-kind", "/kind")
