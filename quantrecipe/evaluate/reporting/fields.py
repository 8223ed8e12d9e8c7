"""Results in JSON, read strictly: what is missing, or something else, is named with its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantrecipe.checkpoint import file_sha256
from quantrecipe.schema.document import Document, read_document
from quantrecipe.schema.parsed import JsonValue, child, describe
from quantrecipe.schema.problems import InvalidInput, Problem


@dataclass(frozen=True, slots=True)
class Source:
    """A file that the report was made of.

    Attributes:
        name: without its folder.
        sha256: of its bytes.
    """

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Fields:
    """A value of a JSON document, and where it stands.

    Attributes:
        value: the value.
        document: the document.
        pointer: its JSON pointer.
        what: what the document should be, for problems.
    """

    value: JsonValue
    document: Document
    pointer: str
    what: str

    def __getitem__(self, key: str) -> Fields:
        """An entry of an object.

        Raises:
            InvalidInput: it has none, or is no object.
        """
        found = self.object()
        if key not in found:
            raise self.refused(f"{key!r} is missing")
        return self._at(key, found[key])

    def get(self, key: str) -> Fields | None:
        """An entry of an object; ``None`` where it has none, or null.

        Raises:
            InvalidInput: it is no object.
        """
        found = self.object().get(key)
        return None if found is None else self._at(key, found)

    def refused(self, message: str) -> InvalidInput:
        """What to raise where the value cannot be what it should be."""
        problem = Problem(
            "not-a-result", f"{message}, so this is not {self.what}", pointer=self.pointer
        )
        return InvalidInput(self.document.locate(problem))

    def object(self) -> dict[str, JsonValue]:
        """The value as an object.

        Raises:
            InvalidInput: it is none.
        """
        if not isinstance(self.value, dict):
            raise self.refused(f"this is {describe(self.value)} and no object")
        return self.value

    def items(self) -> Iterator[Fields]:
        """The values of a list.

        Raises:
            InvalidInput: it is none.
        """
        if not isinstance(self.value, list):
            raise self.refused(f"this is {describe(self.value)} and no list")
        yield from (self._at(index, each) for index, each in enumerate(self.value))

    def number(self) -> float:
        """The value as a number.

        Raises:
            InvalidInput: it is none.
        """
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.refused(f"this is {describe(self.value)} and no number")
        return float(self.value)

    def whole(self) -> int:
        """The value as a whole number.

        Raises:
            InvalidInput: it is none.
        """
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            raise self.refused(f"this is {describe(self.value)} and no whole number")
        return self.value

    def text(self) -> str:
        """The value as a text.

        Raises:
            InvalidInput: it is none.
        """
        if not isinstance(self.value, str):
            raise self.refused(f"this is {describe(self.value)} and no text")
        return self.value

    def numbers(self) -> tuple[float, ...]:
        """The value as a list of numbers.

        Raises:
            InvalidInput: it is none.
        """
        return tuple(each.number() for each in self.items())

    def _at(self, token: str | int, value: JsonValue) -> Fields:
        return Fields(value, self.document, child(self.pointer, token), self.what)


def read_fields(path: Path, what: str) -> tuple[Fields, Source]:
    """Read a JSON file.

    Args:
        path: the file.
        what: what it should be, for problems: "what `rank --json` prints".

    Raises:
        InvalidInput: it cannot be read, or is no strict JSON; every problem is in it.
        SourceError: the system could not read it.
    """
    document = read_document(path)
    return Fields(document.value, document, "", what), Source(path.name, file_sha256(path))
