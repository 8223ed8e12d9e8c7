"""Strict JSON: what is read, what is refused, and where."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.json_text import parse_json
from quantrecipe.schema.parsed import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_INTEGER,
    MAX_PROBLEMS,
    MAX_VALUES,
    Place,
    child,
)

NUMBERS = (
    st.integers(-MAX_INTEGER, MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([1e22, -0.0, 5e-324])
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def kinds(text: str | bytes) -> list[str]:
    return [problem.kind for problem in parse_json(text).problems]


@given(JSON, st.sampled_from([None, 0, 2]), st.booleans())
def test_what_json_writes_is_read_back(value: Any, indent: int | None, ascii_only: bool) -> None:
    parsed = parse_json(json.dumps(value, indent=indent, ensure_ascii=ascii_only))
    assert parsed.complete
    assert not parsed.problems
    assert parsed.value == value


@given(JSON, st.sampled_from(["\n", "\r\n", " "]))
def test_every_value_stands_where_it_is_said_to(value: Any, line_break: str) -> None:
    text = json.dumps(value, indent=1).replace("\n", line_break)
    parsed = parse_json(text)
    lines = text.split(line_break) if line_break != " " else [text]

    def check(here: Any, pointer: str) -> None:
        place = parsed.value_place(pointer)
        assert place is not None
        rest = line_break.join([lines[place.line - 1][place.column - 1 :], *lines[place.line :]])
        decoded, _ = json.JSONDecoder().raw_decode(rest)
        assert decoded == here
        entries = here.items() if isinstance(here, dict) else []
        for key, entry in entries:
            key_place = parsed.key_place(child(pointer, key))
            assert key_place is not None
            line = lines[key_place.line - 1][key_place.column - 1 :]
            assert json.JSONDecoder().raw_decode(line)[0] == key
            check(entry, child(pointer, key))
        if isinstance(here, list):
            for index, entry in enumerate(here):
                check(entry, child(pointer, index))

    check(value, "")


@given(st.text(alphabet='{}[]:,"\\ \n0123456789.eE+-truefalsn', max_size=40) | st.text(max_size=20))
def test_what_is_accepted_is_what_the_standard_library_reads(text: str) -> None:
    parsed = parse_json(text)
    if not parsed.problems:
        assert json.loads(text) == parsed.value
    elif [problem.kind for problem in parsed.problems] == ["syntax"]:
        with pytest.raises(json.JSONDecodeError):
            json.loads(text)


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("1.0", 1),
        ("1e2", 100),
        ("-0", 0),
        ("-0.0", 0),
        ("1E+2", 100),
        ("100e-2", 1),
        ("1.5", 1.5),
        ("1e-6", 1e-6),
        ("1e22", 1e22),
        ("1e-400", 0),
        (str(MAX_INTEGER), MAX_INTEGER),
    ],
)
def test_numbers_are_told_apart_by_value(literal: str, value: float) -> None:
    parsed = parse_json(literal)
    assert not parsed.problems
    assert parsed.value == value
    assert type(parsed.value) is type(value)


REFUSED = {
    "a duplicate key": ('{"a": 1,\n "a": 2}', "duplicate-key", (2, 2), "/a"),
    "a duplicate key by escape": ('{"a": 1, "\\u0061": 2}', "duplicate-key", (1, 10), "/a"),
    "NaN": ("[1,\n  NaN]", "not-finite", (2, 3), "/1"),
    "Infinity": ('{"x": Infinity}', "not-finite", (1, 7), "/x"),
    "-Infinity": ("-Infinity", "not-finite", (1, 1), ""),
    "a large integer": ("[9007199254740992]", "unsafe-integer", (1, 2), "/0"),
    "a large negative integer": ("[-9007199254740992]", "unsafe-integer", (1, 2), "/0"),
    "an integer of 10000 digits": ("9" * 10_000, "unsafe-integer", (1, 1), ""),
    "an overflow": ("[1e400]", "number-overflow", (1, 2), "/0"),
    "a lone surrogate": ('{"x": "a\\ud800"}', "lone-surrogate", (1, 7), "/x"),
    "a lone surrogate in a key": ('{"\\udc00": 1}', "lone-surrogate", (1, 2), ""),
    "trailing data": ("{} {}", "trailing-data", (1, 4), None),
    "a second line": ("1\n2", "trailing-data", (2, 1), None),
    "a byte order mark": ("\ufeff{}", "byte-order-mark", (1, 1), None),
    "nothing": ("", "empty-document", (1, 1), None),
    "white space": (" \n ", "empty-document", (2, 2), None),
    "a trailing comma": ("[1,\n]", "syntax", (2, 1), None),
    "a trailing comma in an object": ('{"a":1,}', "syntax", (1, 8), None),
    "no comma": ("[1 2]", "syntax", (1, 4), None),
    "no colon": ('{"a" 1}', "syntax", (1, 6), None),
    "a key without quotes": ("{a: 1}", "syntax", (1, 2), None),
    "single quotes": ("['a']", "syntax", (1, 2), None),
    "a comment": ("// hi\n{}", "syntax", (1, 1), None),
    "a word": ("[yes]", "syntax", (1, 2), None),
    "True": ("[True]", "syntax", (1, 2), None),
    "a leading zero": ("[01]", "syntax", (1, 2), None),
    "a leading plus": ("[+1]", "syntax", (1, 2), None),
    "a leading point": ("[.5]", "syntax", (1, 2), None),
    "a trailing point": ("[1.]", "syntax", (1, 2), None),
    "a hexadecimal number": ("[0x1F]", "syntax", (1, 2), None),
    "a control character": ('["a\tb"]', "syntax", (1, 4), None),
    "a string that does not end": ('{"a": "b', "syntax", (1, 7), None),
    "an object that does not end": ('{"a": 1', "syntax", (1, 8), None),
    "an unknown escape": ('["\\x"]', "syntax", (1, 3), None),
    "other white space": ("\u00a0{}", "syntax", (1, 1), None),
    "100001 open lists": ("[" * 100_001, "too-deep", (1, MAX_DEPTH + 1), None),
    "100001 open objects": ('{"a":' * 100_001, "too-deep", (1, 5 * MAX_DEPTH + 1), None),
}


@pytest.mark.parametrize(("text", "kind", "place", "pointer"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(text: str, kind: str, place: tuple[int, int], pointer: str | None) -> None:
    parsed = parse_json(text, "recipe.json")
    (problem,) = parsed.problems
    assert problem.kind == kind
    assert (problem.line, problem.column) == place
    assert problem.pointer == pointer
    assert problem.file == "recipe.json"


def test_the_deepest_document_that_is_read() -> None:
    assert not kinds("[" * MAX_DEPTH + "]" * MAX_DEPTH)


@pytest.mark.parametrize(
    ("data", "kind", "place"),
    [
        pytest.param(b'{"a":\n "\xff"}', "not-utf-8", (2, 3), id="latin-1"),
        pytest.param('{"a": 1}'.encode("utf-16"), "not-utf-8", (1, 1), id="utf-16"),
        pytest.param(b'"\xed\xa0\x80"', "not-utf-8", (1, 2), id="an encoded surrogate"),
        pytest.param(b"\xef\xbb\xbf{}", "byte-order-mark", (1, 1), id="a byte order mark"),
    ],
)
def test_bytes_that_are_no_text(data: bytes, kind: str, place: tuple[int, int]) -> None:
    (problem,) = parse_json(data).problems
    assert (problem.kind, problem.line, problem.column) == (kind, *place)


@pytest.mark.parametrize(
    "text",
    [b" " * (MAX_BYTES + 1), " " * (MAX_BYTES + 1), "é" * (MAX_BYTES // 2 + 1)],
    ids=["bytes", "text", "text that is larger in UTF-8"],
)
def test_too_large(text: str | bytes) -> None:
    assert kinds(text) == ["too-large"]


@pytest.mark.parametrize("name", ["recipe.lock.json", "out/their.lock.json"])
def test_locks_may_be_larger_and_fuller(name: str) -> None:
    full = "[" + "1," * MAX_VALUES + "1]" + " " * MAX_BYTES
    assert parse_json(full, name).problems == ()
    assert [problem.kind for problem in parse_json(full, "recipe.json").problems] == ["too-large"]


def test_faults_that_end_nothing_are_all_reported() -> None:
    parsed = parse_json('{"a": NaN, "b": 1, "b": [1e999], "c": 99999999999999999999, "d": true}')
    assert parsed.complete
    assert parsed.value == {"a": None, "b": 1, "c": None, "d": True}
    found = [(problem.kind, problem.pointer) for problem in parsed.problems]
    assert found == [
        ("not-finite", "/a"),
        ("duplicate-key", "/b"),
        ("number-overflow", "/b/0"),
        ("unsafe-integer", "/c"),
    ]


def test_the_first_of_two_equal_keys_keeps_its_place() -> None:
    parsed = parse_json('{"a": {"x": 1},\n "a": {"x": 2, "x": 3, "y": 4}}')
    assert parsed.value_place("/a/x") == Place(1, 13)
    assert parsed.value_place("/a/y") is None
    assert [problem.kind for problem in parsed.problems] == ["duplicate-key", "duplicate-key"]


def test_a_text_full_of_faults_is_not_read_to_the_end() -> None:
    parsed = parse_json("[" + "NaN," * 100_000 + "1]")
    assert len(parsed.problems) == MAX_PROBLEMS + 1
    assert parsed.problems[-1].kind == "too-many-problems"
    assert not parsed.complete


def test_a_text_full_of_values_is_not_read_to_the_end() -> None:
    assert kinds("[" + "1," * (MAX_VALUES + 1) + "1]") == ["too-large"]


def test_columns_count_characters() -> None:
    assert parse_json('["🎉é", 1]').value_place("/1") == Place(1, 8)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("[True]", "'true'"),
        ("[yes]", "quotes"),
        ("[1,]", "none after the last"),
        ("[NaN]", "finite"),
        ("{} 1", "One document"),
    ],
)
def test_hints_say_what_to_do(text: str, hint: str) -> None:
    (problem,) = parse_json(text).problems
    assert hint in (problem.hint or "")
