"""Walking through a GGUF header: bytes, strings and metadata values, within limits.

Whatever a header claims to hold is held against the size of the file before a byte of it is read.
Values become text as they are read: a hostile file gets no more memory than a large one.
"""

from __future__ import annotations

from io import RawIOBase
from json.encoder import encode_basestring
from typing import Final

from quantrecipe.checkpoint.opening import read_exactly
from quantrecipe.checkpoint.scan import ScanError
from quantrecipe.schema.gguf_values import (
    ARRAY,
    DEEPEST,
    LENGTH_BYTES,
    SCALARS,
    STRING,
    Scalar,
    array_kind,
    numbers_json,
    string_text,
    value_text,
)

MAX_HEADER_BYTES: Final = 100_000_000
MAX_ELEMENTS: Final = 4_000_000
"""The most elements that all arrays of the metadata may have together."""

MAX_METADATA_CHARACTERS: Final = 200_000_000
"""The most characters that the metadata may have as text."""

_READ_AHEAD: Final = 1 << 20
_NUMBERS_AT_A_TIME: Final = 1 << 16


class Cursor:
    """A position in a header, of which no more is read than was asked for, and a little ahead."""

    def __init__(self, file: RawIOBase, size: int) -> None:
        self._file = file
        self.size = size
        self._buffer = bytearray()
        self.position = 0

    def fits(self, count: int, what: str) -> None:
        """Make sure that ``count`` more bytes can be there.

        Raises:
            ScanError: the file ends before, or the header would be too large.
        """
        left = self.size - self.position
        if count > left:
            raise ScanError(
                "truncated-file",
                f"{what}, {count:,} bytes or more, and the file has {left:,} left",
                self.position,
            )
        if self.position + count > MAX_HEADER_BYTES:
            raise ScanError(
                "header-too-large",
                f"{what}, {count:,} bytes; headers of up to {MAX_HEADER_BYTES:,} bytes are read",
                self.position,
            )

    def take(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes."""
        self.fits(count, what)
        end = self.position + count
        if end > len(self._buffer):
            wanted = min(max(end, len(self._buffer) + _READ_AHEAD), self.size)
            self._buffer += read_exactly(self._file, wanted - len(self._buffer))
            if end > len(self._buffer):
                raise ScanError(
                    "truncated-file", "the file became shorter while it was read", self.position
                )
        taken = bytes(self._buffer[self.position : end])
        self.position = end
        return taken

    def unsigned(self, nbytes: int, what: str) -> int:
        """The next number."""
        return int.from_bytes(self.take(nbytes, what), "little")

    def string(self, what: str, longest: int = MAX_HEADER_BYTES) -> str:
        """The next string.

        Raises:
            ScanError: it is longer than ``longest``, or not UTF-8.
        """
        start = self.position
        length = self.unsigned(LENGTH_BYTES, what)
        if length > longest:
            raise ScanError("bad-string", f"{what} of {length:,} bytes is too long", start)
        taken = self.take(length, what)
        try:
            return taken.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ScanError("bad-string", f"{what} is not UTF-8: {error.reason}", start) from None

    def up_to(self, end: int) -> bytearray:
        """The file's bytes before ``end``, or all where it is shorter."""
        end = min(end, self.size)
        if end > self.position:
            self.take(end - self.position, "padding")
        return self._buffer[:end]


class Values:
    """Reads metadata values as text, no more of them than the limits of this module."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._elements = 0
        self._characters = 0

    def value(self) -> str:
        """The text of the next value."""
        number = self._cursor.unsigned(4, "the type of a value")
        if number == STRING:
            return self._counted(string_text(self._cursor.string("a string")))
        if number == ARRAY:
            return value_text(*self._array(1))
        scalar = self._scalar(number)
        return value_text(scalar.name, self._numbers(scalar, 1))

    def _array(self, depth: int) -> tuple[str, str]:
        """The type and the JSON of the next array."""
        start = self._cursor.position
        if depth > DEEPEST:
            raise ScanError("bad-value", f"arrays are nested more than {DEEPEST} deep", start)
        number = self._cursor.unsigned(4, "the type of an array's elements")
        scalar = None if number in (STRING, ARRAY) else self._scalar(number)
        count = self._cursor.unsigned(LENGTH_BYTES, "the length of an array")
        self._elements += count
        if self._elements > MAX_ELEMENTS:
            raise ScanError(
                "header-too-large",
                f"an array of {count:,} elements; up to {MAX_ELEMENTS:,} in all are read",
                start,
            )
        smallest = LENGTH_BYTES if number == STRING else LENGTH_BYTES + 4
        self._cursor.fits(count * (smallest if scalar is None else scalar.nbytes), "an array")
        if scalar is not None:
            return f"[{scalar.name}]", f"[{self._numbers(scalar, count)}]"
        if number == STRING:
            strings = (encode_basestring(self._cursor.string("a string")) for _ in range(count))
            return "[string]", f"[{','.join(map(self._counted, strings))}]"
        kinds, texts = [], []
        for _ in range(count):
            kind, text = self._array(depth + 1)
            kinds.append(kind)
            texts.append(text)
        return array_kind(kinds), self._counted(f"[{','.join(texts)}]")

    def _numbers(self, scalar: Scalar, count: int) -> str:
        texts = []
        while count:
            some = min(count, _NUMBERS_AT_A_TIME)
            start = self._cursor.position
            packed = self._cursor.take(some * scalar.nbytes, f"a {scalar.name}")
            try:
                numbers = numbers_json(scalar, packed)
            except ValueError as error:
                raise ScanError("bad-value", str(error), start) from None
            texts.append(self._counted(numbers))
            count -= some
        return ",".join(texts)

    def _scalar(self, number: int) -> Scalar:
        scalar = SCALARS.get(number)
        if scalar is None:
            raise ScanError(
                "bad-value", f"{number} is no type of a value", self._cursor.position - 4
            )
        return scalar

    def _counted(self, text: str) -> str:
        self._characters += len(text)
        if self._characters > MAX_METADATA_CHARACTERS:
            raise ScanError(
                "header-too-large",
                f"as text the metadata has more than {MAX_METADATA_CHARACTERS:,} characters",
                self._cursor.position,
            )
        return text
