"""A document on disk: its value, and the place of everything in it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from io import BufferedReader
from os import PathLike, fspath
from pathlib import Path
from typing import Final

from quantrecipe.schema.json_text import parse_json
from quantrecipe.schema.location import Location
from quantrecipe.schema.parsed import (
    MAX_BYTES,
    JsonValue,
    Parsed,
    at,
    max_bytes,
    parent,
    too_large,
    unread,
)
from quantrecipe.schema.problems import InvalidInput, Problem

STDIN: Final = "-"
YAML_SUFFIXES: Final = (".yaml", ".yml")

# Problems that concern a key rather than what stands behind it.
_OF_KEYS: Final = frozenset({"unknown-field", "bad-key", "unknown-part", "unused-scheme"})


@dataclass(frozen=True, slots=True)
class Document:
    """A text without a fault of its own; whether it holds to a schema is another question.

    Attributes:
        file: its path as it was given, ``<stdin>``, or what the caller calls it.
        value: the JSON value.
        positions: where each key and value stands, by JSON pointer.
    """

    file: str
    value: JsonValue
    positions: Parsed

    def locate(self, problem: Problem) -> Problem:
        """The problem with file, line and column of its pointer, where they are not yet known.

        A pointer to something that is missing is located at what should have held it.
        """
        if problem.file not in (None, self.file) or problem.line is not None:
            return problem
        problem = replace(problem, file=self.file)
        if problem.pointer is None:
            return problem
        place = None
        if problem.kind in _OF_KEYS:
            place = self.positions.key_place(problem.pointer)
        pointer = problem.pointer
        while place is None:
            place = self.positions.value_place(pointer)
            if place is None and not pointer:
                return problem
            pointer = parent(pointer)
        return at(problem, place)


def located(error: InvalidInput, document: Document) -> InvalidInput:
    """The same error with every problem located in the document."""
    return InvalidInput(document.locate(problem) for problem in error.problems)


def read_parsed(source: str | PathLike[str] | Location) -> Parsed:
    """Read a file strictly, with its problems noted rather than raised.

    Args:
        source: a path, a file elsewhere, or ``-`` for standard input. ``.yaml`` and ``.yml`` are
            YAML, all else JSON.

    Raises:
        InvalidInput: the file cannot be read (kind ``unreadable``).
    """
    if not isinstance(source, str | PathLike):
        return _parsed(source, str(source))
    name = fspath(source)
    if name == STDIN:
        return parse_text(sys.stdin.buffer.read(MAX_BYTES + 1), "<stdin>")
    return _parsed(Path(name), name)


def _parsed(path: Location, name: str) -> Parsed:
    try:
        size = path.stat().st_size
    except (OSError, ValueError):
        size = 0  # what is the matter is said by reading it
    if size > max_bytes(name):
        return unread(name, too_large(size, name))
    return parse_text(_read(path), name)


def parse_text(text: str | bytes, file: str) -> Parsed:
    """Read a text strictly, as YAML if ``file`` is called so and as JSON otherwise."""
    if file.lower().endswith(YAML_SUFFIXES):
        # Only who writes YAML pays for importing its reader.
        from quantrecipe.schema.yaml_text import parse_yaml

        return parse_yaml(text, file)
    return parse_json(text, file)


def document_of(parsed: Parsed) -> Document:
    """The document, if the text has no fault of its own.

    Raises:
        InvalidInput: it has; every fault is in it.
    """
    if parsed.problems:
        raise InvalidInput(parsed.problems)
    return Document(parsed.file, parsed.value, parsed)


def read_document(source: str | PathLike[str]) -> Document:
    """Read a document strictly.

    Args:
        source: a path, or ``-`` for standard input. ``.yaml`` and ``.yml`` are YAML, all else JSON.

    Raises:
        InvalidInput: the file cannot be read, or its text is refused; every problem is in it.
    """
    return document_of(read_parsed(source))


def _read(path: Location) -> bytes:
    """At most one byte more than a document may have.

    Raises:
        InvalidInput: the file cannot be read.
    """
    hint = None
    try:
        if path.is_dir():
            message, hint = "this is a folder", "Name the document inside it."
        else:
            with BufferedReader(path.open("rb", buffering=0)) as file:
                return file.read(max_bytes(path.name) + 1)
    except FileNotFoundError:
        message, hint = "there is no such file", _near(path)
    except PermissionError:
        message, hint = "the file may not be read", "Check its permissions."
    except (OSError, ValueError) as error:
        # ValueError: a path with a NUL character in it.
        message = f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
    raise InvalidInput(Problem("unreadable", message, hint, file=str(path)))


def _near(path: Location) -> str:
    """A hint for a path that does not exist: the file beside it with nearly the same name."""
    from quantrecipe.schema.problems import closest

    try:
        near = closest(path.name, (entry.name for entry in path.parent.iterdir()))
    except OSError:
        return f"There is no folder {str(path.parent)!r} either."
    return f"Did you mean {str(path.parent / near)!r}?" if near else "Check the path."
