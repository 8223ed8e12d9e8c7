"""What a strict reader makes of a text: a JSON value, and where each piece of it stands."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from types import MappingProxyType
from typing import Final, TypeAlias

from quantrecipe.schema.problems import Problem

_TYPE_NAMES: Final = MappingProxyType(
    {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a whole number",
        float: "a number",
        type(None): "null",
    }
)

MAX_DEPTH: Final = 100
"""Objects and lists inside one another."""

MAX_BYTES: Final = 16 << 20
"""The largest document that is read, in bytes of UTF-8."""

MAX_INTEGER: Final = (1 << 53) - 1
"""The largest whole number that every JSON reader keeps exactly (RFC 8259, section 6)."""

MAX_VALUES: Final = 1_000_000
"""Values in one document."""

MAX_LOCK_BYTES: Final = 256 << 20
"""The largest lock that is read. Locks are written by programs, and have about 500 bytes for each
tensor."""

MAX_LOCK_VALUES: Final = 8_000_000
"""Values in one lock, which has about 15 for each tensor."""

LOCK_SUFFIX: Final = ".lock.json"
"""How files are called that are read as locks, as large as these may be."""

MAX_PROBLEMS: Final = 200
"""Problems of one sort that are reported of one document; more would help nobody."""

JsonValue: TypeAlias = bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"] | None

JSON_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")

_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_BREAK = re.compile(r"\r\n|\n|\r")

# A whole number up to the largest exact one has at most 16 digits; `int` refuses huge ones anyway.
_MOST_DIGITS = 17


@dataclass(frozen=True, slots=True)
class Place:
    """A 1-based position in a text; columns count code points."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Parsed:
    """A text as it was read.

    Attributes:
        file: what the text is called.
        value: the JSON value; what could not be read is ``None`` inside it.
        complete: whether the whole text was read, so that ``value`` is worth a closer look.
        problems: everything a strict reader refuses, in the order of the text.
        values: offset of each value in the text, by JSON pointer.
        keys: offset of each object key in the text, by the pointer of its value.
        line_starts: offset of the first character of each line, ascending.
    """

    file: str
    value: JsonValue
    complete: bool
    problems: tuple[Problem, ...]
    values: Mapping[str, int] = field(repr=False)
    keys: Mapping[str, int] = field(repr=False)
    line_starts: Sequence[int] = field(repr=False)

    def value_place(self, pointer: str) -> Place | None:
        """Where the value at ``pointer`` begins, or ``None`` if there is none."""
        offset = self.values.get(pointer)
        return None if offset is None else place_of(self.line_starts, offset)

    def key_place(self, pointer: str) -> Place | None:
        """Where the key of the value at ``pointer`` begins; ``None`` for items of a list."""
        offset = self.keys.get(pointer)
        return None if offset is None else place_of(self.line_starts, offset)


def line_starts(text: str) -> tuple[int, ...]:
    """The offset of the first character of each line; lines end as editors end them."""
    return (0, *(match.end() for match in _LINE_BREAK.finditer(text)))


def place_of(starts: Sequence[int], offset: int) -> Place:
    """Line and column of an offset."""
    line = bisect_right(starts, offset)
    return Place(line, offset - starts[line - 1] + 1)


def child(pointer: str, token: str | int) -> str:
    """The JSON pointer of an entry of the value at ``pointer`` (RFC 6901)."""
    return f"{pointer}/{str(token).replace('~', '~0').replace('/', '~1')}"


def join(tokens: Iterable[str | int]) -> str:
    """The JSON pointer with these tokens."""
    pointer = ""
    for token in tokens:
        pointer = child(pointer, token)
    return pointer


def parent(pointer: str) -> str:
    """The JSON pointer of what holds the value at ``pointer``; the root is its own parent."""
    return pointer.rpartition("/")[0]


def describe(value: object) -> str:
    """A JSON value in a few words: its type, and itself when it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list) and not value:
        return "an empty object" if isinstance(value, dict) else "an empty list"
    name = _TYPE_NAMES.get(type(value), type(value).__name__)
    if isinstance(value, dict | list):
        return name
    text = repr(value)
    return f"{name}, {text}" if len(text) <= 60 else name


def read_number(text: str) -> tuple[int | float | None, str | None]:
    """The number a JSON number literal stands for, or ``None`` and the kind of problem it is.

    Numbers are told apart by value, as JSON Schema and RFC 8785 do: ``1.0`` and ``1e2`` are whole.
    """
    if not any(mark in text for mark in ".eE"):
        if len(text) > _MOST_DIGITS or abs(int(text)) > MAX_INTEGER:
            return None, "unsafe-integer"
        return int(text), None
    number = float(text)
    if math.isinf(number):
        return None, "number-overflow"
    if number.is_integer() and abs(number) <= MAX_INTEGER:
        return int(number), None
    return number, None


def number_problem(kind: str, text: str) -> Problem:
    """Why ``read_number`` refused this literal."""
    shown = text if len(text) <= 40 else f"{text[:37]}..."
    if kind == "number-overflow":
        return Problem(kind, f"{shown} is larger than any double", "Write a finite number.")
    return Problem(
        kind,
        f"{shown} is beyond 2^53 - 1, the largest whole number that every reader keeps exactly",
        "Write it as a string if it is an identifier.",
    )


def too_many(what: str) -> Problem:
    """Said instead of the problems that are left out."""
    message = f"there are more than {MAX_PROBLEMS} {what}; the rest is left out"
    return Problem("too-many-problems", message, "Mend these first.", pointer="")


def capped(problems: Iterable[Problem], what: str) -> tuple[Problem, ...]:
    """The first problems, and a word on the others."""
    found = tuple(islice(problems, MAX_PROBLEMS + 1))
    return found if len(found) <= MAX_PROBLEMS else (*found[:-1], too_many(what))


def max_bytes(file: str) -> int:
    """The largest document of this name that is read, in bytes of UTF-8."""
    return MAX_LOCK_BYTES if file.endswith(LOCK_SUFFIX) else MAX_BYTES


def max_values(file: str) -> int:
    """The most values that are read of a document of this name."""
    return MAX_LOCK_VALUES if file.endswith(LOCK_SUFFIX) else MAX_VALUES


def too_many_values(file: str) -> Problem:
    """A text that is not long, but full."""
    message = f"the document holds more than {max_values(file):,} values"
    return Problem("too-large", message, _LARGE_HINT)


def has_lone_surrogate(text: str) -> bool:
    """Whether a string holds half of a surrogate pair, which no UTF-8 text can."""
    return _SURROGATE.search(text) is not None


def decode(data: bytes, file: str) -> tuple[str, Problem | None]:
    """UTF-8 bytes as text; what cannot be decoded is a problem with its place."""
    if len(data) > max_bytes(file):
        return "", too_large(len(data), file)
    try:
        return data.decode("utf-8"), None
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        place = place_of(line_starts(before), len(before))
        utf_16 = data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in data[:4]
        problem = Problem(
            "not-utf-8",
            "this is UTF-16 text" if utf_16 else f"byte {error.start} is not UTF-8 text",
            "Save the file as UTF-8.",
            file=file,
        )
        return "", at(problem, place)


def check_text(text: str, file: str) -> Problem | None:
    """Why a text is refused before a look at its syntax: too large, or a byte order mark."""
    most = max_bytes(file)
    size = len(text) if len(text) > most else len(text.encode("utf-8", "surrogatepass"))
    if size > most:
        return too_large(size, file)
    if text.startswith("\ufeff"):
        return Problem(
            "byte-order-mark",
            "the text begins with a byte order mark, which most readers refuse",
            "Save the file as UTF-8 without a byte order mark.",
            file=file,
            line=1,
            column=1,
        )
    return None


def at(problem: Problem, place: Place) -> Problem:
    """The problem, at this place."""
    return replace(problem, line=place.line, column=place.column)


def unread(file: str, problem: Problem) -> Parsed:
    """A text that nothing could be read of."""
    return Parsed(file, None, False, (problem,), MappingProxyType({}), MappingProxyType({}), (0,))


_LARGE_HINT = f"Is this the right file? Only locks, called *{LOCK_SUFFIX}, may be large."


def too_large(size: int, file: str) -> Problem:
    """A document of more bytes than are read of one of its name."""
    message = f"the document has {size:,} bytes, more than the {max_bytes(file):,} that are read"
    return Problem("too-large", message, _LARGE_HINT, file=file)
