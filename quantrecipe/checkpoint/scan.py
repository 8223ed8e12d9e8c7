"""A scanner for the one shape of JSON that a safetensors header has.

A general parser would build whatever a hostile file asks for before anything can be judged: a
header of 100 MB of ``[[],[],`` becomes gigabytes. This one walks from member to member and hands
only short, flat objects to the standard library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final, Never

LONGEST_ENTRY: Final = 16_384
"""The most characters that the description of one tensor may have."""

_SPACE: Final = re.compile(r"[ \t\n\r]*")
_FLAT: Final = re.compile(r"\{[^{}]*\}")
_PLAIN_STRING: Final = re.compile(r'"([^"\\\x00-\x1f\x80-\U0010ffff]*)"')
_SIZE: Final = r"(?:0|[1-9][0-9]{0,17})"
_USUAL_ENTRY: Final = re.compile(
    rf'\{{"dtype":"([A-Z0-9_]+)","shape":\[((?:{_SIZE}(?:,{_SIZE})*)?)\],'
    rf'"data_offsets":\[({_SIZE}),({_SIZE})\]\}}'
)


class ScanError(ValueError):
    """The text is not what it should be.

    Attributes:
        kind: the kind of the problem, kebab-case.
        position: the character of the text at which it shows, from 0.
    """

    def __init__(self, kind: str, message: str, position: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.position = position


class DuplicateKey(ValueError):  # noqa: N818 - reads as what it says
    """A JSON object names a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} appears twice")
        self.key = key


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` that refuses duplicate keys.

    Raises:
        DuplicateKey: a key appears twice.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKey(key)
            seen.add(key)
    return result


def no_constant(name: str) -> Never:
    """A ``parse_constant`` that refuses ``NaN`` and the infinities."""
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int | float:
    # JSON readers with unsigned integers take "-0" for a fraction; Python would take it for 0.
    return -0.0 if digits == "-0" else int(digits)


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=unique_pairs, parse_constant=no_constant, parse_int=_integer
)


class Scanner:
    """A position in a text, and the steps that a header is read by."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        here = self.text[self.position : self.position + 1]
        if here and here in " \t\n\r":
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            here = self.text[self.position : self.position + 1]
        return here

    def expect(self, character: str) -> None:
        """Step over ``character``.

        Raises:
            ScanError: something else is there.
        """
        found = self.peek()
        if found != character:
            seen = repr(found) if found else "the end"
            raise ScanError(
                "header-not-json", f"expected {character!r}, found {seen}", self.position
            )
        self.position += 1

    def string(self) -> str:
        """Step over a string and return it.

        Raises:
            ScanError: no string is there, or one that is no Unicode text.
        """
        if self.peek() != '"':
            self.expect('"')
        start = self.position
        plain = _PLAIN_STRING.match(self.text, start)
        if plain is not None:
            self.position = plain.end()
            return plain[1]
        try:
            value, self.position = _DECODER.raw_decode(self.text, start)
        except ValueError as error:
            raise ScanError("header-not-json", f"a broken string: {error}", start) from None
        assert isinstance(value, str)
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ScanError("header-not-json", "half of a surrogate pair", start) from None
        return value

    def members(self) -> Iterator[str]:
        """Step through an object, yielding each key; who iterates steps over its value.

        Raises:
            ScanError: it is not an object.
        """
        self.expect("{")
        if self.peek() == "}":
            self.position += 1
            return
        while True:
            key = self.string()
            self.expect(":")
            yield key
            if self.peek() != ",":
                break
            self.position += 1
        self.expect("}")

    def flat_object(self) -> dict[str, Any]:
        """Step over an object without objects inside and return it.

        Raises:
            ScanError: it is not one, or longer than ``LONGEST_ENTRY``.
        """
        self.peek()
        start = self.position
        usual = _USUAL_ENTRY.match(self.text, start, start + LONGEST_ENTRY)
        if usual is not None:  # what every writer writes, at a third of the time
            self.position = usual.end()
            return {
                "dtype": usual[1],
                "shape": [int(size) for size in usual[2].split(",")] if usual[2] else [],
                "data_offsets": [int(usual[3]), int(usual[4])],
            }
        match = _FLAT.match(self.text, start, start + LONGEST_ENTRY)
        if match is None:
            raise ScanError(
                "bad-tensor-entry", "expected an object of dtype, shape and data_offsets", start
            )
        self.position = match.end()
        try:
            value = _DECODER.decode(match[0])
        except DuplicateKey as error:
            raise ScanError("duplicate-key", str(error), start) from None
        except (ValueError, RecursionError) as error:
            reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
            raise ScanError("header-not-json", f"a broken object: {reason}", start) from None
        assert isinstance(value, dict)
        return value

    def end(self) -> None:
        """Make sure that only white space is left.

        Raises:
            ScanError: something else is.
        """
        if self.peek():
            raise ScanError(
                "header-not-json", "something follows the end of the header", self.position
            )
