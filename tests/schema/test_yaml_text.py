"""YAML as a way of writing JSON: what has one meaning is read, all else is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.json_text import parse_json
from quantrecipe.schema.parsed import MAX_DEPTH, MAX_INTEGER, MAX_PROBLEMS, Place
from quantrecipe.schema.yaml_text import MAX_YAML_BYTES, parse_yaml

TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cn"], exclude_characters="\ufeff\u2028\u2029"),
    max_size=20,
)
NUMBERS = st.integers(-MAX_INTEGER, MAX_INTEGER) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
AMBIGUOUS = """
~ Null NULL True TRUE False yes Yes YES no No on On ON off OFF y Y n N = <<
010 08 0x1F 0o7 0b101 1_000 .5 5. +1 +1.5 1_0.5 -010 007 .inf -.inf +.Inf .nan .NaN
1:30 190:20:30.5 2020-01-01 2020-1-1 2001-12-14t21:59:43.10-05:00
"""
WORDS = st.sampled_from([*AMBIGUOUS.split(), "null", "true", "1e3", "1e-6", "-0", "a.b", "-"])


@given(JSON)
def test_json_is_yaml_with_the_same_meaning(value: Any) -> None:
    text = json.dumps(value, indent=1)
    as_json, as_yaml = parse_json(text), parse_yaml(text)
    assert not as_yaml.problems
    assert as_yaml.value == as_json.value
    assert as_yaml.values == as_json.values
    assert as_yaml.keys == as_json.keys


@given(WORDS | st.text(alphabet="0123456789abcdefox_.:+-eE~yn ", max_size=8))
def test_a_plain_scalar_is_read_as_json_would_or_as_every_yaml_reader_would(word: str) -> None:
    """What is accepted and is not JSON is text to YAML 1.1, too."""
    parsed = parse_yaml(f"- {word}")
    if parsed.problems:
        return
    assert isinstance(parsed.value, list)
    (value,) = parsed.value
    try:
        assert json.loads(word) == value
    except ValueError:
        assert yaml.safe_load(f"- {word}") == [value]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("null", None),
        ("true", True),
        ("false", False),
        ("1e-6", 1e-6),
        ("1e2", 100),
        ("1.0", 1),
        ("-1.5", -1.5),
        ("0", 0),
        ("'010'", "010"),
        ('"on"', "on"),
        ("int8", "int8"),
        ("layers.*.w", "layers.*.w"),
        ("re:a+", "re:a+"),
        ("1.2.3", "1.2.3"),
        ("5GB", "5GB"),
        ("online", "online"),
        ("nothing", "nothing"),
        ("two\n  lines", "two lines"),
    ],
)
def test_scalars_that_are_read(word: str, value: Any) -> None:
    parsed = parse_yaml(f"x: {word}\n")
    assert not parsed.problems
    assert parsed.value == {"x": value}


@pytest.mark.parametrize("word", AMBIGUOUS.split())
def test_scalars_that_mean_different_things_are_refused(word: str) -> None:
    parsed = parse_yaml(f"name: x\nvalue: {word}\n", "r.yaml")
    (problem,) = parsed.problems
    assert problem.kind == "ambiguous-scalar"
    assert (problem.file, problem.line, problem.column) == ("r.yaml", 2, 8)
    assert problem.pointer == "/value"
    assert "quotes" in (problem.hint or "")
    assert parse_yaml(f"value: '{word}'").value == {"value": word}


REFUSED = {
    "an empty value": ("a:\nb: 1", "ambiguous-scalar", (1, 3), "/a"),
    "an anchor": ("a: &x 1", "yaml-feature", (1, 4), "/a"),
    "a tag": ("a: !!str 1", "yaml-feature", (1, 4), "/a"),
    "a tag of a language": ("a: !!python/name:os.system x", "yaml-feature", (1, 4), "/a"),
    "a local tag on a list": ("a: !mine [1]", "yaml-feature", (1, 4), "/a"),
    "a merge key": ("a:\n  <<: {b: 1}", "yaml-feature", (2, 3), "/a"),
    "two documents": ("--- 1\n--- 2\n", "several-documents", (2, 1), None),
    "a duplicate key": ("a: 1\nb: 2\na: 3\n", "duplicate-key", (3, 1), "/a"),
    "a duplicate key in braces": ("{a: 1, 'a': 2}", "duplicate-key", (1, 8), "/a"),
    "a number as a key": ("1: a", "non-string-key", (1, 1), ""),
    "a boolean as a key": ("x:\n  on: a", "non-string-key", (2, 3), "/x"),
    "null as a key": ("null: a", "non-string-key", (1, 1), ""),
    "a list as a key": ("? [a]\n: 1", "non-string-key", (1, 3), None),
    "an alias as a key": ("a: 1\n*a : 2", "non-string-key", (2, 1), None),
    "a directive": ("%YAML 1.1\n---\na: 1\n", "yaml-feature", (1, 1), None),
    "nothing": ("", "empty-document", None, None),
    "a comment alone": ("# nothing\n", "empty-document", None, None),
    "a tab": ("a:\n\tb: 1", "syntax", (2, 1), None),
    "a brace that stays open": ("{a: 1", "syntax", (1, 6), None),
    "a control character": ("a: \x01", "syntax", (1, 4), None),
    "an escape beyond Unicode": ('a: "\\U00110000"', "syntax", None, None),
    "a lone surrogate": ('a: "\\ud800"', "lone-surrogate", (1, 4), "/a"),
    "a large integer": ("a: 9007199254740992", "unsafe-integer", (1, 4), "/a"),
    "an overflow": ("a: 1e999", "number-overflow", (1, 4), "/a"),
    "a byte order mark": ("\ufeffa: 1", "byte-order-mark", (1, 1), None),
    "many open lists": ("[" * 100_000, "too-deep", (1, MAX_DEPTH + 1), None),
    "many nested items": ("- " * 10_000, "too-deep", (1, 2 * MAX_DEPTH + 1), None),
    "a large document": ("#" * (MAX_YAML_BYTES + 1), "too-large", None, None),
}


@pytest.mark.parametrize(("text", "kind", "place", "pointer"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(text: str, kind: str, place: tuple[int, int] | None, pointer: str | None) -> None:
    parsed = parse_yaml(text, "recipe.yaml")
    problem = parsed.problems[0]
    assert problem.kind == kind
    assert len(parsed.problems) == 1
    if place is not None:
        assert (problem.line, problem.column) == place
    assert problem.pointer == pointer
    assert problem.file == "recipe.yaml"


def test_aliases_are_never_followed() -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    parsed = parse_yaml("\n".join(lines))
    assert {problem.kind for problem in parsed.problems} == {"yaml-feature"}
    assert parsed.value == {"a0": ["x", "x"], **{f"a{i}": [None, None] for i in range(1, 60)}}


def test_faults_that_end_nothing_are_all_reported() -> None:
    parsed = parse_yaml("a: on\nb: &x 010\na: {c: 1}\nd: ~\n")
    assert parsed.complete
    assert [(problem.kind, problem.line) for problem in parsed.problems] == [
        ("ambiguous-scalar", 1),
        ("yaml-feature", 2),
        ("ambiguous-scalar", 2),
        ("duplicate-key", 3),
        ("ambiguous-scalar", 4),
    ]


def test_a_text_full_of_faults_is_not_read_to_the_end() -> None:
    parsed = parse_yaml("- on\n" * 1000)
    assert len(parsed.problems) == MAX_PROBLEMS + 1
    assert (parsed.problems[-1].kind, parsed.problems[-1].line) == ("too-many-problems", 201)


def test_places() -> None:
    parsed = parse_yaml("# recipe\nrules:\n  - modules: [a, 'b']\n    scheme: w\n")
    assert parsed.key_place("/rules") == Place(2, 1)
    assert parsed.value_place("/rules/0") == Place(3, 5)
    assert parsed.value_place("/rules/0/modules/1") == Place(3, 18)
    assert parsed.key_place("/rules/0/scheme") == Place(4, 5)
    assert parsed.key_place("/rules/0") is None
