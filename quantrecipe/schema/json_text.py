"""Strict JSON (RFC 8259) with the place of every key and value.

Stricter than most readers: duplicate keys, NaN and infinities, numbers that a double does not hold
and lone surrogates are refused. All of those are reported at once; an error of syntax ends it.
"""

from __future__ import annotations

import json.decoder as _decoder
import re
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, NoReturn

from quantrecipe.schema.parsed import (
    JSON_NUMBER,
    MAX_DEPTH,
    MAX_PROBLEMS,
    JsonValue,
    Parsed,
    at,
    check_text,
    child,
    decode,
    has_lone_surrogate,
    line_starts,
    max_values,
    number_problem,
    place_of,
    read_number,
    too_many,
    too_many_values,
    unread,
)
from quantrecipe.schema.problems import Problem, did_you_mean

# Not in the type stubs, but the documented hook that JSONDecoder reads strings with.
_scan_string: Any = vars(_decoder)["scanstring"]

_SPACE = re.compile(r"[ \t\n\r]*")
_WORD = re.compile(r"-?[A-Za-z_][A-Za-z0-9_]*")
_NUMBER_LIKE = re.compile(r"[-+.0-9][-+.0-9A-Za-z_]*")
_LITERALS: Final = MappingProxyType({"null": None, "true": True, "false": False})
_NOT_FINITE: Final = ("NaN", "Infinity", "-Infinity")


class _SyntaxError(Exception):
    """The text cannot be read any further; carries the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def parse_json(text: str | bytes, file: str = "<text>") -> Parsed:
    """Read strict JSON.

    Args:
        text: the document; bytes must be UTF-8.
        file: what to call it in problems.

    Returns:
        The value with the place of every key and value, and every problem found. Nothing is raised:
        ``complete`` says whether the syntax held to the end.
    """
    if isinstance(text, bytes):
        text, undecodable = decode(text, file)
        if undecodable is not None:
            return unread(file, undecodable)
    refused = check_text(text, file)
    if refused is not None:
        return unread(file, refused)
    reader = _Reader(text, file)
    value: JsonValue = None
    complete = True
    try:
        value = reader.document()
    except _SyntaxError as error:
        reader.problems.append(error.problem)
        complete = False
    return Parsed(
        file,
        value,
        complete,
        tuple(reader.problems),
        MappingProxyType(reader.values),
        MappingProxyType(reader.keys),
        reader.starts,
    )


class _Reader:
    """One pass over a text. Recursion is bounded by ``MAX_DEPTH``."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        self.most_values = max_values(file)
        self.starts = line_starts(text)
        self.problems: list[Problem] = []
        self.values: dict[str, int] = {}
        self.keys: dict[str, int] = {}
        self.end = 0

    def document(self) -> JsonValue:
        self._skip_space()
        if self.end == len(self.text):
            self._fail("empty-document", "there is no value in the document")
        value = self._value("", 0)
        self._skip_space()
        if self.end < len(self.text):
            message = f"{self._seen()} follows after the end of the document"
            self._fail("trailing-data", message, "One document a file.")
        return value

    def _value(self, pointer: str, depth: int) -> JsonValue:
        self.values[pointer] = self.end
        if len(self.values) > self.most_values:
            self._stop(too_many_values(self.file))
        first = self.text[self.end : self.end + 1]
        if first == '"':
            return self._string(pointer)
        if first in ("{", "["):
            if depth == MAX_DEPTH:
                self._fail("too-deep", f"objects and lists nest more than {MAX_DEPTH} deep")
            nested = self._object if first == "{" else self._array
            return nested(pointer, depth + 1)
        return self._number_or_word(pointer)

    def _object(self, pointer: str, depth: int) -> JsonValue:
        found: dict[str, JsonValue] = {}
        self.end += 1
        self._skip_space()
        if self._take("}"):
            return found
        while True:
            if self.text[self.end : self.end + 1] != '"':
                hint = "A key is a string in double quotes."
                self._fail("syntax", f"expected a key, not {self._seen()}", hint)
            start = self.end
            key = self._string(pointer)
            if key in found:
                here = child(pointer, key)
                first = place_of(self.starts, self.keys[here])
                message = f"the key {key!r} is there twice; the first is in line {first.line}"
                self._note(start, Problem("duplicate-key", message, "Remove one.", pointer=here))
                here = ""
            else:
                here = child(pointer, key)
                self.keys[here] = start
            self._skip_space()
            if not self._take(":"):
                self._fail("syntax", f"expected ':' after the key {key!r}, not {self._seen()}")
            self._skip_space()
            if here:
                found[key] = self._value(here, depth)
            else:
                self._repeated(child(pointer, key), depth)
            if self._closed("}"):
                return found

    def _repeated(self, pointer: str, depth: int) -> None:
        """Read the value of a key that was there before: it is checked, but not kept."""
        values, keys = self.values, self.keys
        self.values, self.keys = {}, {}
        self._value(pointer, depth)
        self.values, self.keys = values, keys

    def _array(self, pointer: str, depth: int) -> JsonValue:
        found: list[JsonValue] = []
        self.end += 1
        self._skip_space()
        if self._take("]"):
            return found
        while True:
            found.append(self._value(child(pointer, len(found)), depth))
            if self._closed("]"):
                return found

    def _closed(self, closing: str) -> bool:
        """Read what follows an entry: a comma, or the end of what holds it."""
        self._skip_space()
        if self._take(closing):
            return True
        if not self._take(","):
            self._fail("syntax", f"expected ',' or {closing!r}, not {self._seen()}")
        self._skip_space()
        if self.text[self.end : self.end + 1] == closing:
            message = f"a comma stands before the closing {closing!r}"
            self._fail("syntax", message, "JSON allows none after the last entry.")
        return False

    def _string(self, pointer: str) -> str:
        start = self.end
        try:
            value, self.end = _scan_string(self.text, start + 1, True)
        except ValueError as error:
            self.end = getattr(error, "pos", start)
            message = str(getattr(error, "msg", error)).lower().removesuffix(" at")
            self._fail("syntax", f"in a string: {message}")
        if has_lone_surrogate(value):
            message = "the string holds half of a surrogate pair, which UTF-8 cannot"
            self._note(start, Problem("lone-surrogate", message, pointer=pointer))
            return str(value.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return str(value)

    def _number_or_word(self, pointer: str) -> JsonValue:
        match = _WORD.match(self.text, self.end)
        if match is not None:
            return self._word(match.group(), pointer)
        match = _NUMBER_LIKE.match(self.text, self.end)
        if match is None:
            self._fail("syntax", f"expected a value, not {self._seen()}")
        literal = match.group()
        if not JSON_NUMBER.fullmatch(literal):
            shown = literal if len(literal) <= 40 else f"{literal[:37]}..."
            self._fail("syntax", f"{shown!r} is not a JSON number")
        number, kind = read_number(literal)
        if kind is not None:
            self._note(self.end, number_problem(kind, literal), pointer)
        self.end = match.end()
        return number

    def _word(self, word: str, pointer: str) -> JsonValue:
        if word in _NOT_FINITE:
            message = f"{word} is not a JSON number"
            self._note(self.end, Problem("not-finite", message, "Write a finite number."), pointer)
        elif word not in _LITERALS:
            known = ("true", "false", "null")
            hint = did_you_mean(word, known) if word.lower() in known else "Strings need quotes."
            self._fail("syntax", f"{word[:40]!r} is not a JSON value", hint)
        self.end += len(word)
        return _LITERALS.get(word)

    def _skip_space(self) -> None:
        match = _SPACE.match(self.text, self.end)
        self.end = match.end() if match else self.end

    def _take(self, character: str) -> bool:
        taken = self.text[self.end : self.end + 1] == character
        self.end += taken
        return taken

    def _seen(self) -> str:
        if self.end >= len(self.text):
            return "the end of the text"
        if self.text.startswith(("//", "/*", "#"), self.end):
            return "a comment, which JSON does not have,"
        return repr(self.text[self.end])

    def _note(self, offset: int, problem: Problem, pointer: str | None = None) -> None:
        if len(self.problems) == MAX_PROBLEMS:
            self._stop(too_many("faults in the text"))
        place = place_of(self.starts, offset)
        where = problem.pointer if pointer is None else pointer
        self.problems.append(
            Problem(
                problem.kind,
                problem.message,
                problem.hint,
                self.file,
                place.line,
                place.column,
                where,
            )
        )

    def _fail(self, kind: str, message: str, hint: str | None = None) -> NoReturn:
        self._stop(Problem(kind, message, hint))

    def _stop(self, problem: Problem) -> NoReturn:
        place = place_of(self.starts, self.end)
        raise _SyntaxError(at(replace(problem, file=self.file), place))
