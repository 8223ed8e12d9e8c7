"""Metadata values of GGUF as text, so that they survive wherever metadata is made of strings.

A string is itself. Anything else is ``gguf:TYPE:JSON``: ``gguf:uint32:32``, ``gguf:bool:true``,
``gguf:[float32]:[0.5,1.0]`` for an array. In the type of an array stands that of its elements once,
or, where they are arrays of different types, one after the other: ``gguf:[[uint8],[string]]:…``; an
array of no arrays is ``[array]``. A string that itself begins with ``gguf:`` has ``gguf:string:``
before it. Floating-point numbers have enough digits for the same bits to be read back: float32 has
7, or 9 where 7 are too few. Those that are not finite are the hexadecimal digits of their bits, in
quotes.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

PREFIX: Final = "gguf:"
STRING: Final = 8
ARRAY: Final = 9
DEEPEST: Final = 8
"""How far arrays may be nested."""

LENGTH_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Scalar:
    """A type of one number.

    Attributes:
        name: as texts call it.
        number: as files call it.
        code: of the module ``struct``.
        nbytes: its size.
    """

    name: str
    number: int
    code: str
    nbytes: int

    @property
    def is_float(self) -> bool:
        """Whether it is a floating-point type."""
        return self.code in "fd"


_EVERY: Final = (
    Scalar("uint8", 0, "B", 1),
    Scalar("int8", 1, "b", 1),
    Scalar("uint16", 2, "H", 2),
    Scalar("int16", 3, "h", 2),
    Scalar("uint32", 4, "I", 4),
    Scalar("int32", 5, "i", 4),
    Scalar("float32", 6, "f", 4),
    Scalar("bool", 7, "B", 1),
    Scalar("uint64", 10, "Q", 8),
    Scalar("int64", 11, "q", 8),
    Scalar("float64", 12, "d", 8),
)
SCALARS: Final = MappingProxyType({scalar.number: scalar for scalar in _EVERY})
_BY_NAME: Final = MappingProxyType({scalar.name: scalar for scalar in _EVERY})
_HEX: Final = re.compile(r"0x[0-9a-f]+", re.ASCII)


def string_text(string: str) -> str:
    """The text of a string."""
    return f"{PREFIX}string:{string}" if string.startswith(PREFIX) else string


def value_text(kind: str, value: str) -> str:
    """The text of any other value.

    Args:
        kind: its type, as texts say it.
        value: its JSON.
    """
    return f"{PREFIX}{kind}:{value}"


def numbers_json(scalar: Scalar, packed: bytes | bytearray | memoryview) -> str:
    """Packed little-endian numbers as JSON, with commas between them.

    Raises:
        ValueError: a bool that is neither 0 nor 1.
    """
    count = len(packed) // scalar.nbytes
    numbers = struct.unpack(f"<{count}{scalar.code}", packed)
    if scalar.name == "bool":
        if any(number > 1 for number in numbers):
            raise ValueError("a bool is neither 0 nor 1")
        return ",".join("true" if number else "false" for number in numbers)
    if not scalar.is_float:
        return ",".join(map(str, numbers))
    texts = []
    for place, number in enumerate(numbers):
        if math.isfinite(number):
            texts.append(_float_json(number, scalar))
        else:
            # From its bytes: a NaN may lose some of its bits on the way through a float.
            bits = bytes(packed[place * scalar.nbytes : (place + 1) * scalar.nbytes])
            texts.append(f'"0x{bits[::-1].hex()}"')
    return ",".join(texts)


def array_kind(kinds: Sequence[str]) -> str:
    """The type of an array of arrays of these types."""
    if not kinds:
        return "[array]"
    if all(kind == kinds[0] for kind in kinds):
        return f"[{kinds[0]}]"
    return f"[{','.join(kinds)}]"


def pack_string(string: str) -> bytes:
    """A string as files hold it: its length in bytes, then UTF-8.

    Raises:
        ValueError: it is no Unicode text.
    """
    encoded = string.encode("utf-8")
    return len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded


def pack_value(text: str) -> bytes:
    """A value as files hold it, from its text: the number of its type, then the value.

    Raises:
        ValueError: the text begins like that of a value and is none.
    """
    if not text.startswith(PREFIX):
        return _type_number(STRING) + pack_string(text)
    kind, colon, value = text[len(PREFIX) :].partition(":")
    if not colon:
        raise ValueError("there is no value after its type")
    if kind == "string":
        return _type_number(STRING) + pack_string(value)
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the value is no JSON: {error}") from None
    number, packed = _pack(_Kind.of(kind), parsed)
    return _type_number(number) + packed


def _type_number(number: int) -> bytes:
    return number.to_bytes(4, "little")


def _float_json(number: float, scalar: Scalar) -> str:
    if scalar.code == "d":
        text = repr(number)
    else:
        text = f"{number:.7g}"
        try:
            same = struct.unpack("<f", struct.pack("<f", float(text)))[0] == number
        except OverflowError:  # rounded up from the largest
            same = False
        text = text if same else f"{number:.9g}"
    return text if "." in text or "e" in text else f"{text}.0"


@dataclass(frozen=True, slots=True)
class _Kind:
    """A type: a name, or the types of an array's elements."""

    name: str = ""
    elements: tuple[_Kind, ...] = ()

    @classmethod
    def of(cls, text: str) -> _Kind:
        kind, rest = cls._read(text, 0)
        if rest:
            raise ValueError(f"{text!r} is no type")
        return kind

    @classmethod
    def _read(cls, text: str, depth: int) -> tuple[_Kind, str]:
        if depth > DEEPEST:
            raise ValueError(f"arrays are nested more than {DEEPEST} deep")
        if not text.startswith("["):
            name = re.match(r"[a-z0-9]*", text)
            assert name is not None
            return cls(name[0]), text[name.end() :]
        elements: list[_Kind] = []
        rest = ","
        while rest.startswith(","):
            found, rest = cls._read((text if not elements else rest)[1:], depth + 1)
            elements.append(found)
        if not rest.startswith("]"):
            raise ValueError(f"{text!r} is no type")
        return cls(elements=tuple(elements)), rest[1:]


def _pack(kind: _Kind, value: Any) -> tuple[int, bytes]:
    """The number of a type, and a value of it."""
    if not kind.elements:
        if kind.name == "string" and isinstance(value, str):
            return STRING, pack_string(value)
        scalar = _scalar(kind.name)
        return scalar.number, _pack_number(scalar, value)
    if not isinstance(value, list):
        raise ValueError("an array's value is no list")
    first = kind.elements[0]
    if first.name == "array" and not value and len(kind.elements) == 1:
        number, packed = ARRAY, b""
    elif first.elements:
        if len(kind.elements) not in (1, len(value)) or not value:
            raise ValueError(f"{len(kind.elements)} types for {len(value)} arrays")
        kinds = kind.elements if len(kind.elements) > 1 else (first,) * len(value)
        inner = [_pack(each, element) for each, element in zip(kinds, value, strict=True)]
        number, packed = ARRAY, b"".join(part for _, part in inner)
        if any(found != ARRAY for found, _ in inner):
            raise ValueError("arrays beside what is none")
    elif len(kind.elements) > 1:
        raise ValueError("only arrays in an array may have different types")
    elif first.name == "string":
        if not all(isinstance(element, str) for element in value):
            raise ValueError("an array of strings holds something else")
        number, packed = STRING, b"".join(map(pack_string, value))
    else:
        scalar = _scalar(first.name)
        number, packed = scalar.number, b"".join(_pack_number(scalar, each) for each in value)
    return ARRAY, _type_number(number) + len(value).to_bytes(LENGTH_BYTES, "little") + packed


def _scalar(name: str) -> Scalar:
    scalar = _BY_NAME.get(name)
    if scalar is None:
        raise ValueError(f"{name!r} is no type of a value")
    return scalar


def _pack_number(scalar: Scalar, value: Any) -> bytes:
    if scalar.name == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is no bool")
        return b"\1" if value else b"\0"
    if scalar.is_float:
        return _pack_float(scalar, value)
    if type(value) is not int:
        raise ValueError(f"{value!r} is no whole number")
    return _struct_pack(scalar, value)


def _pack_float(scalar: Scalar, value: Any) -> bytes:
    if isinstance(value, str) and _HEX.fullmatch(value) and len(value) == 2 + 2 * scalar.nbytes:
        return bytes.fromhex(value[2:])[::-1]
    if type(value) is not float or not math.isfinite(value):
        raise ValueError(f"{value!r} is no floating-point number")
    return _struct_pack(scalar, value)


def _struct_pack(scalar: Scalar, value: float) -> bytes:
    try:
        return struct.pack(f"<{scalar.code}", value)
    except (struct.error, OverflowError):
        raise ValueError(f"{value!r} does not fit {scalar.name}") from None
