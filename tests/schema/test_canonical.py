"""The canonical form and the digest that everything else is tied to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from quantrecipe.schema.canonical import canonical_bytes, digest, recipe_digest
from quantrecipe.schema.json_text import parse_json
from quantrecipe.schema.validation import parse_recipe

MINIMAL = (
    '{"kind": "recipe", "version": 1, "name": "small", "source": {"layout": "plain"},'
    ' "schemes": {"a": {"weight": {"format": "int8", "granularity": "channel"}}},'
    ' "rules": [{"modules": ["**"], "scheme": "a"}], "target": {"layout": "int8-scaled"}}'
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": 1, "a": [True, None]}, b'{"a":[true,null],"b":1}'),
        ({"\u20ac": 1, "\r": 2, "1": 3, "\U0001f600": 4, "\ufb33": 5}, None),
        (
            [1.0, 1e21, 1e-7, 0.1, -0.0, 333333333.3333333],
            b"[1,1e+21,1e-7,0.1,0,333333333.3333333]",
        ),
        ('\u20ac$\x0f\nA\'B"\\\\"/', '"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'.encode()),
    ],
    ids=["order of keys", "order by UTF-16 units", "numbers", "strings"],
)
def test_golden_bytes(value: Any, text: bytes | None) -> None:
    expected = text or '{"\\r":2,"1":3,"\u20ac":1,"\U0001f600":4,"\ufb33":5}'.encode()
    assert canonical_bytes(value) == expected
    assert digest(value) == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 2**53, {1: 2}, {"a": object()}, "\ud800"],
    ids=["NaN", "infinity", "a large integer", "a number as a key", "an object", "a surrogate"],
)
def test_what_is_not_json_has_no_canonical_form(value: Any) -> None:
    with pytest.raises(ValueError, match="no canonical JSON"):
        canonical_bytes(value)


def test_the_digest_of_a_recipe_follows_from_its_file_alone() -> None:
    value = json.loads(MINIMAL)
    expected = hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
    assert recipe_digest(parse_recipe(MINIMAL)) == expected


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL.replace('"version": 1', '"version": 1.0'),
        MINIMAL.replace(" ", "\n  "),
        MINIMAL.replace('"small"', '"sm\\u0061ll"'),
    ],
    ids=["a number written otherwise", "white space", "an escape"],
)
def test_the_digest_does_not_depend_on_how_a_recipe_is_written(text: str) -> None:
    assert recipe_digest(parse_recipe(text)) == recipe_digest(parse_recipe(MINIMAL))


def test_the_digest_does_depend_on_what_a_recipe_says() -> None:
    changed = MINIMAL.replace('"channel"', '"tensor"')
    assert recipe_digest(parse_recipe(changed)) != recipe_digest(parse_recipe(MINIMAL))


def test_the_corpus_has_digests_that_do_not_depend_on_the_model() -> None:
    folder = Path(__file__).parent / "cases"
    cases = parse_json((folder / "recipe-structure.json").read_bytes()).value
    assert isinstance(cases, list)
    for case in cases:
        assert isinstance(case, dict)
        if case["valid"]:
            recipe = parse_recipe(json.dumps(case["recipe"]))
            assert recipe_digest(recipe) == digest(case["recipe"])
