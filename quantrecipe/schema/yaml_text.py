"""YAML as a way of writing JSON, with the place of every key and value.

Only what has one meaning to every reader is read. An unquoted scalar is ``null``, ``true``,
``false`` or a number exactly where JSON says so (``1e-6`` is a number, though YAML 1.1 takes it for
text); one that some YAML reader takes for something other than its text (``on``, ``010``, ``1:30``)
is refused, and so is what has no place in JSON: anchors, tags, merge keys, several documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, cast

import yaml

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
    number_problem,
    place_of,
    read_number,
    too_many,
    unread,
)
from quantrecipe.schema.problems import Problem

MAX_YAML_BYTES: Final = 1 << 20
"""The largest YAML document that is read; reading YAML takes a hundred times as long as JSON."""

_CONSTANTS: Final = MappingProxyType({"null": None, "true": True, "false": False})

# What some reader of YAML 1.1 or 1.2 takes for something other than the text that stands there.
_AMBIGUOUS: Final = re.compile(
    r"""(?x)
    | ~ | = | << | null | true | false | yes | no | on | off | y | n
    | [-+]?\.inf | \.nan
    | [-+]?0b[01_]+ | [-+]?0o[0-7_]+ | [-+]?0x[0-9a-f_]+
    | [-+]?[0-9][0-9_]*                             # 010, 1_000, +1
    | [-+]?(?:[0-9][0-9_]*)?\.[0-9_]*(?:e[-+]?[0-9]+)?      # .5, 1., 1_0.0
    | [-+]?[0-9][0-9_]*(?:\.[0-9_]*)?e[-+]?[0-9]+
    | [-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?      # 1:30, in base 60
    | [0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt\ \t].*)?         # 2020-01-01
    """,
    re.IGNORECASE,
)
_HINT = "Write it in quotes if it is text, else as JSON would."


@dataclass(slots=True)
class _Open:
    """A mapping or sequence that is being read; ``key`` is set between a key and its value."""

    pointer: str
    value: dict[str, JsonValue] | list[JsonValue]
    key: str | None = None
    repeated: bool = False

    def next_pointer(self) -> str:
        if isinstance(self.value, list):
            return child(self.pointer, len(self.value))
        return child(self.pointer, self.key or "")

    def add(self, value: JsonValue) -> None:
        if isinstance(self.value, list):
            self.value.append(value)
        else:
            if self.key is not None and not self.repeated:
                self.value[self.key] = value
            self.key, self.repeated = None, False


class _UnreadableError(Exception):
    """The text cannot be read any further; carries the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def parse_yaml(text: str | bytes, file: str = "<text>") -> Parsed:
    """Read YAML as JSON.

    Args:
        text: the document; bytes must be UTF-8.
        file: what to call it in problems.

    Returns:
        The same as ``parse_json``. No object is ever constructed, and no alias followed.
    """
    if isinstance(text, bytes):
        text, undecodable = decode(text, file)
        if undecodable is not None:
            return unread(file, undecodable)
    refused = check_text(text, file)
    if refused is None and len(text) > MAX_YAML_BYTES:
        message = (
            f"the document has more than the {MAX_YAML_BYTES:,} characters of YAML that are read"
        )
        refused = Problem("too-large", message, "Write large documents as JSON.", file=file)
    if refused is not None:
        return unread(file, refused)
    reader = _Reader(text, file)
    complete = True
    try:
        reader.read()
    except _UnreadableError as error:
        reader.problems.append(error.problem)
        complete = False
    return Parsed(
        file,
        reader.root,
        complete,
        tuple(reader.problems),
        MappingProxyType(reader.values),
        MappingProxyType(reader.keys),
        reader.starts,
    )


class _Reader:
    """Builds values from the stream of events, so that nesting and aliases cost nothing."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        self.starts = line_starts(text)
        self.problems: list[Problem] = []
        self.values: dict[str, int] = {}
        self.keys: dict[str, int] = {}
        self.root: JsonValue = None
        self.documents = 0
        self.open: list[_Open] = []

    def read(self) -> None:
        for event in self._events():
            self._event(event)
        if self.documents == 0:
            raise _UnreadableError(
                Problem("empty-document", "there is no value in the document", file=self.file)
            )

    def _events(self) -> Iterator[yaml.Event]:
        try:
            yield from yaml.parse(self.text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            message = error.problem or error.context or "this is not YAML"
            raise _UnreadableError(self._at(mark, "syntax", f"not YAML: {message}")) from None
        except yaml.reader.ReaderError as error:
            place = place_of(self.starts, int(error.position))
            message = f"not YAML: {error.reason}"
            raise _UnreadableError(at(Problem("syntax", message, file=self.file), place)) from None
        except (ValueError, OverflowError) as error:
            # An escape beyond Unicode, or a version directive of more digits than `int` reads.
            message = f"not YAML: {error}"
            raise _UnreadableError(Problem("syntax", message, file=self.file)) from None

    def _event(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self._document(event)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            closed = self.open.pop()
            self._finish(cast(JsonValue, closed.value))
        elif isinstance(event, yaml.NodeEvent):
            self._node(event)

    def _document(self, event: yaml.DocumentStartEvent) -> None:
        self.documents += 1
        if self.documents > 1:
            raise _UnreadableError(
                self._at(
                    event.start_mark,
                    "several-documents",
                    "a second document begins here",
                    "One document a file.",
                )
            )
        if event.version or event.tags:
            self._note(event, "yaml-feature", "directives are not read", "Remove the '%' lines.")

    def _node(self, event: yaml.NodeEvent) -> None:
        holder = self.open[-1] if self.open else None
        if holder is not None and isinstance(holder.value, dict) and holder.key is None:
            self._key(event, holder)
            return
        pointer = holder.next_pointer() if holder else ""
        self.values.setdefault(pointer, _offset(event.start_mark))
        self._refuse_features(event, pointer)
        if isinstance(event, yaml.ScalarEvent):
            self._finish(self._scalar(event, pointer))
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(self.open) == MAX_DEPTH:
                message = f"objects and lists nest more than {MAX_DEPTH} deep"
                raise _UnreadableError(self._at(event.start_mark, "too-deep", message))
            mapping = isinstance(event, yaml.MappingStartEvent)
            self.open.append(_Open(pointer, {} if mapping else []))
        else:
            self._finish(None)

    def _finish(self, value: JsonValue) -> None:
        if self.open:
            self.open[-1].add(value)
        else:
            self.root = value

    def _key(self, event: yaml.NodeEvent, holder: _Open) -> None:
        if not isinstance(event, yaml.ScalarEvent):
            message = "a key must be text, not a list, an object or an alias"
            raise _UnreadableError(self._at(event.start_mark, "non-string-key", message))
        self._refuse_features(event, holder.pointer)
        key = str(event.value)
        if event.style is None and key == "<<":
            hint = "Write the fields out."
            self._note(event, "yaml-feature", "merge keys are not read", hint, holder.pointer)
        elif event.style is None and (_AMBIGUOUS.fullmatch(key) or JSON_NUMBER.fullmatch(key)):
            message = f"the key {key!r} is not text to every reader of YAML"
            self._note(event, "non-string-key", message, "Write it in quotes.", holder.pointer)
        key = self._text(event, key, holder.pointer)
        assert isinstance(holder.value, dict)
        pointer = child(holder.pointer, key)
        holder.key = key
        if key in holder.value:
            first = place_of(self.starts, self.keys[pointer])
            message = f"the key {key!r} is there twice; the first is in line {first.line}"
            self._note(event, "duplicate-key", message, "Remove one.", pointer)
            holder.repeated = True
        else:
            self.keys.setdefault(pointer, _offset(event.start_mark))

    def _scalar(self, event: yaml.ScalarEvent, pointer: str) -> JsonValue:
        text = str(event.value)
        if event.style is not None:
            return self._text(event, text, pointer)
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if JSON_NUMBER.fullmatch(text):
            number, kind = read_number(text)
            if kind is not None:
                problem = number_problem(kind, text)
                self._note(event, kind, problem.message, problem.hint, pointer)
            return number
        if _AMBIGUOUS.fullmatch(text):
            shown = repr(text) if text else "an empty value"
            message = f"{shown} means different things to different readers of YAML"
            hint = _HINT if text else "Write null, or '' for an empty text."
            self._note(event, "ambiguous-scalar", message, hint, pointer)
        return self._text(event, text, pointer)

    def _text(self, event: yaml.ScalarEvent, text: str, pointer: str) -> str:
        # Escapes stand for UTF-16 units, as in JSON, so two of them may be one character.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        if not has_lone_surrogate(text):
            return text
        message = "the string holds half of a surrogate pair, which UTF-8 cannot"
        self._note(event, "lone-surrogate", message, None, pointer)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _refuse_features(self, event: yaml.NodeEvent, pointer: str) -> None:
        if isinstance(event, yaml.AliasEvent):
            self._note(event, "yaml-feature", "aliases are not read", "Write it out.", pointer)
        elif event.anchor is not None:
            self._note(event, "yaml-feature", "anchors are not read", "Remove it.", pointer)
        tag = getattr(event, "tag", None)
        if tag is not None:
            hint = "Remove the tag; quotes make a text."
            self._note(event, "yaml-feature", f"tags are not read: {tag}", hint, pointer)

    def _note(
        self,
        event: yaml.Event,
        kind: str,
        message: str,
        hint: str | None = None,
        pointer: str | None = None,
    ) -> None:
        if len(self.problems) == MAX_PROBLEMS:
            last = too_many("faults in the text")
            raise _UnreadableError(
                self._at(event.start_mark, last.kind, last.message, last.hint, "")
            )
        self.problems.append(self._at(event.start_mark, kind, message, hint, pointer))

    def _at(
        self,
        mark: object,
        kind: str,
        message: str,
        hint: str | None = None,
        pointer: str | None = None,
    ) -> Problem:
        place = place_of(self.starts, _offset(mark))
        return at(Problem(kind, message, hint, self.file, pointer=pointer), place)


def _offset(mark: object) -> int:
    """Where a mark of the YAML reader points; the two kinds of mark share no base class."""
    return int(getattr(mark, "index", 0))
