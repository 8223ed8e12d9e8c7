"""Errors of the models as problems: where in the document they are, and what a person reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from pydantic_core import ErrorDetails

from quantrecipe.schema.base import PATTERN_MEANINGS
from quantrecipe.schema.known import known_fields, known_types
from quantrecipe.schema.parsed import describe, join
from quantrecipe.schema.problems import Problem, closest, did_you_mean

Tokens = tuple[str | int, ...]

_EXPECTED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "string_type": "a string",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "tuple_type": "a list",
        "dict_type": "an object",
        "model_type": "an object",
        "model_attributes_type": "an object",
    }
)
_TYPE_WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "string": "a string",
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "array": "a list",
        "object": "an object",
    }
)
_RANGES: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "greater_than_equal": ("ge", "at least"),
        "greater_than": ("gt", "more than"),
        "less_than_equal": ("le", "at most"),
        "less_than": ("lt", "less than"),
    }
)
_QUOTED = re.compile(r"'([^']*)'")
_KEY = "[key]"


def problem_of(kind: str, value: Any, error: ErrorDetails) -> Problem:
    """One error of a model as a problem of the document.

    Args:
        kind: of the document.
        value: the whole document, a JSON value.
        error: what the model of that kind said of it.
    """
    loc = error["loc"]
    if loc and loc[-1] == _KEY:
        tokens = walk(value, loc[:-1])
        return _of_key(tokens, error)
    if error["type"] == "missing":
        return _missing(kind, value, walk(value, loc[:-1]), loc[-1])
    tokens = walk(value, loc)
    return _of_value(kind, value, tokens, error)


def is_echo(error: ErrorDetails) -> bool:
    """Whether a list or an object is only short of the entries that other errors speak of."""
    found = error["input"]
    return (
        error["type"] == "too_short"
        and isinstance(found, list | dict)
        and len(found) >= error.get("ctx", {})["min_length"]
    )


def walk(value: Any, loc: Sequence[str | int]) -> Tokens:
    """The path of an error inside a document: its location without the tags of unions.

    A tag may look like a key that is there, so the reading that follows the most keys wins.
    """
    best: Tokens = ()
    for tokens in _readings(value, tuple(loc)):
        if len(tokens) > len(best):
            best = tokens
    return best


def _readings(value: Any, loc: Tokens) -> Iterator[Tokens]:
    if not loc:
        yield ()
        return
    step = loc[0]
    if isinstance(value, dict):
        there = isinstance(step, str) and step in value
    else:
        there = isinstance(value, list) and isinstance(step, int) and step < len(value)
    if there:
        for rest in _readings(value[step], loc[1:]):
            yield (step, *rest)
    if isinstance(step, str):
        yield from _readings(value, loc[1:])


def _of_key(tokens: Tokens, error: ErrorDetails) -> Problem:
    key = str(tokens[-1]) if tokens else ""
    expected = _expected_text(error)
    return Problem(
        "bad-key", f"{key!r} cannot be a key here", f"Expected {expected}.", pointer=join(tokens)
    )


def _missing(kind: str, value: Any, tokens: Tokens, last: str | int) -> Problem:
    holder = value
    for token in tokens:
        holder = holder[token]
    if isinstance(last, int):
        count = len(holder)
        message = f"the list is too short: it has {count} {_entries(count)}"
        return Problem("too-short", message, "Add what is missing.", pointer=join(tokens))
    message, hint = f"the field {last!r} is missing", None
    if isinstance(holder, dict):
        # Near misses are searched for among a few: among very many, that takes very long.
        unknown = holder.keys() - set(known_fields(kind, value, tokens))
        near = closest(last, sorted(unknown)[:500])
        hint = f"There is {near!r}; is that it?" if near else None
    return Problem("missing-field", message, hint, pointer=join((*tokens, last)))


def _of_value(kind: str, value: Any, tokens: Tokens, error: ErrorDetails) -> Problem:
    name, pointer = error["type"], join(tokens)
    if name == "extra_forbidden":
        field = str(tokens[-1])
        hint = did_you_mean(field, known_fields(kind, value, tokens[:-1]))
        return Problem("unknown-field", f"there is no field {field!r} here", hint, pointer=pointer)
    if name in ("union_tag_invalid", "union_tag_not_found"):
        return _of_union(kind, value, tokens, error)
    if name == "literal_error":
        return _of_literal(error["input"], str(error.get("ctx", {}).get("expected", "")), pointer)
    if name in _EXPECTED:
        return _wrong_type(_EXPECTED[name], error["input"], pointer)
    if name in _RANGES:
        key, words = _RANGES[name]
        message = f"{error['input']} is out of range"
        limit = error.get("ctx", {})[key]
        return Problem("out-of-range", message, f"Expected {words} {limit:g}.", pointer=pointer)
    make = _SIZES.get(name)
    if make is not None:
        problem_kind, message = make(error.get("ctx", {}))
        return Problem(problem_kind, message, pointer=pointer)
    if name == "string_pattern_mismatch":
        message = f"{_short(error['input'])} does not have the right form"
        hint = f"Expected {_expected_text(error)}."
        return Problem("bad-pattern", message, hint, pointer=pointer)
    return Problem("invalid-value", error["msg"], pointer=pointer)


def _of_union(kind: str, value: Any, tokens: Tokens, error: ErrorDetails) -> Problem:
    context = error.get("ctx", {})
    found = error["input"]
    tag = str(context.get("discriminator", "")).strip("'")
    if tag.endswith("()"):
        types = [_TYPE_WORDS[name] for name in known_types(kind, value, tokens) if name != "null"]
        return _wrong_type(" or ".join(types) or "something else", found, join(tokens))
    if error["type"] == "union_tag_not_found" or not isinstance(found, dict):
        return _missing(kind, value, tokens, tag)
    expected = str(context.get("expected_tags", ""))
    return _of_literal(found.get(tag), expected, join((*tokens, tag)))


def _of_literal(found: Any, expected: str, pointer: str) -> Problem:
    known = _QUOTED.findall(expected)
    if known and isinstance(found, str):
        hint = did_you_mean(found, known)
        return Problem("unknown-value", f"{found!r} is not known here", hint, pointer=pointer)
    if known:
        return _wrong_type(" or ".join(repr(name) for name in known), found, pointer)
    if type(found) is (int if expected[:1].isdigit() else bool):
        message = f"expected {expected}, found {describe(found)}"
        return Problem("unknown-value", message, pointer=pointer)
    return _wrong_type(expected, found, pointer)


def _wrong_type(expected: str, found: Any, pointer: str) -> Problem:
    message = f"expected {expected}, found {describe(found)}"
    return Problem("wrong-type", message, pointer=pointer)


def _expected_text(error: ErrorDetails) -> str:
    """What a string should have been, in words."""
    context = error.get("ctx", {})
    if error["type"] == "string_pattern_mismatch":
        pattern = str(context.get("pattern"))
        return PATTERN_MEANINGS.get(pattern, f"text that matches {pattern}")
    if error["type"] == "literal_error":
        return str(context.get("expected"))
    make = _SIZES.get(error["type"])
    return make(context)[1] if make else "another"


def _too_short_text(context: Mapping[str, Any]) -> tuple[str, str]:
    least = context["min_length"]
    return "too-short", f"at least {least} {'character' if least == 1 else 'characters'} needed"


def _too_long_text(context: Mapping[str, Any]) -> tuple[str, str]:
    return "too-long", f"at most {context['max_length']} characters allowed"


def _too_few(context: Mapping[str, Any]) -> tuple[str, str]:
    least = context["min_length"]
    return "too-short", f"at least {least} {_entries(least)} needed"


def _too_many(context: Mapping[str, Any]) -> tuple[str, str]:
    most = context["max_length"]
    return "too-long", f"at most {most} {_entries(most)} allowed"


_SIZES: Final[Mapping[str, Callable[[Mapping[str, Any]], tuple[str, str]]]] = MappingProxyType(
    {
        "string_too_short": _too_short_text,
        "string_too_long": _too_long_text,
        "too_short": _too_few,
        "too_long": _too_many,
    }
)


def _entries(count: int) -> str:
    return "entry" if count == 1 else "entries"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
