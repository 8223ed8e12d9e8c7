"""GGUF's metadata values as text, and headers as they are written."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.dtypes import BLOCK_DTYPES, DTYPES, byte_size
from quantrecipe.schema.gguf import (
    GGML_TYPES,
    TYPE_OF,
    aligned,
    encode_gguf_header,
    is_container_key,
    plan_gguf_file,
)
from quantrecipe.schema.gguf_values import pack_value
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.tensors import OutputTensor

ARCHITECTURE = {"general.architecture": "test"}


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def string(text: str) -> bytes:
    return u64(len(text.encode())) + text.encode()


# id: (text, the number of the type, the value)
VALUES: dict[str, tuple[str, int, bytes]] = {
    "string": ("a text: of any kind", 8, string("a text: of any kind")),
    "no characters": ("", 8, string("")),
    "string like a value": ("gguf:string:gguf:uint32:1", 8, string("gguf:uint32:1")),
    "uint8": ("gguf:uint8:255", 0, b"\xff"),
    "int8": ("gguf:int8:-128", 1, b"\x80"),
    "uint16": ("gguf:uint16:65535", 2, b"\xff\xff"),
    "int16": ("gguf:int16:-2", 3, b"\xfe\xff"),
    "uint32": ("gguf:uint32:32", 4, u32(32)),
    "int32": ("gguf:int32:-1", 5, b"\xff" * 4),
    "float32": ("gguf:float32:0.1", 6, struct.pack("<f", 0.1)),
    "whole float32": ("gguf:float32:3.0", 6, struct.pack("<f", 3)),
    "negative zero": ("gguf:float32:-0.0", 6, b"\0\0\0\x80"),
    "large float32": ("gguf:float32:1e+20", 6, struct.pack("<f", 1e20)),
    "signalling NaN": ('gguf:float32:"0x7fa00001"', 6, u32(0x7FA00001)),
    "infinity": ('gguf:float64:"0xfff0000000000000"', 12, struct.pack("<d", float("-inf"))),
    "bool": ("gguf:bool:true", 7, b"\1"),
    "uint64": (f"gguf:uint64:{2**64 - 1}", 10, b"\xff" * 8),
    "int64": (f"gguf:int64:{-(2**63)}", 11, bytes(7) + b"\x80"),
    "float64": ("gguf:float64:0.1", 12, struct.pack("<d", 0.1)),
    "numbers": ("gguf:[uint16]:[1,2]", 9, u32(2) + u64(2) + b"\1\0\2\0"),
    "no numbers": ("gguf:[int8]:[]", 9, u32(1) + u64(0)),
    "bools": ("gguf:[bool]:[true,false]", 9, u32(7) + u64(2) + b"\1\0"),
    "strings": ('gguf:[string]:["a","\\"é"]', 9, u32(8) + u64(2) + string("a") + string('"é')),
    "no arrays": ("gguf:[array]:[]", 9, u32(9) + u64(0)),
    "arrays": (
        "gguf:[[uint8]]:[[1],[]]",
        9,
        u32(9) + u64(2) + u32(0) + u64(1) + b"\1" + u32(0) + u64(0),
    ),
    "arrays of different types": (
        'gguf:[[uint8],[string]]:[[1],["a"]]',
        9,
        u32(9) + u64(2) + u32(0) + u64(1) + b"\1" + u32(8) + u64(1) + string("a"),
    ),
    "arrays of arrays": (
        "gguf:[[[bool]]]:[[[true]]]",
        9,
        u32(9) + u64(1) + u32(9) + u64(1) + u32(7) + u64(1) + b"\1",
    ),
}


@pytest.mark.parametrize(("text", "number", "value"), VALUES.values(), ids=VALUES)
def test_texts_of_values(text: str, number: int, value: bytes) -> None:
    assert pack_value(text) == u32(number) + value


@pytest.mark.parametrize(
    "text",
    [
        "gguf:",
        "gguf:uint32",
        "gguf:uint32:",
        "gguf:uint32:x",
        "gguf:uint32:1.0",
        "gguf:uint32:true",
        "gguf:uint32:-1",
        "gguf:uint8:256",
        "gguf:uint9:1",
        "gguf:float32:1",
        "gguf:float32:1e39",
        "gguf:float32:NaN",
        'gguf:float32:"0x7fc0"',
        'gguf:float32:"nan"',
        "gguf:bool:1",
        "gguf:[uint8]:1",
        "gguf:[uint8]:[256]",
        "gguf:[uint8:[1]",
        "gguf:[uint8]]:[1]",
        "gguf:[]:[]",
        "gguf:[array]:[[1]]",
        "gguf:array:[]",
        "gguf:[string]:[1]",
        "gguf:[uint8,int8]:[1,2]",
        "gguf:[[uint8],[int8]]:[[1]]",
        "gguf:[[uint8],int8]:[[1],2]",
        "gguf:[[uint8]]:[]",
        "gguf:" + "[" * 9 + "uint8" + "]" * 9 + ":" + "[" * 9 + "1" + "]" * 9,
        "gguf:[uint8]:" + "[" * 200_000,
    ],
    ids=lambda text: text[:40],
)
def test_texts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        pack_value(text)
    assert not isinstance(caught.value, UnicodeError)
    with pytest.raises(InvalidInput, match="the metadata value of 'key'"):
        encode_gguf_header([], {**ARCHITECTURE, "key": text})


def test_sizes_of_block_dtypes() -> None:
    for name, dtype in BLOCK_DTYPES.items():
        assert byte_size(name, (3, 2 * dtype.numbers)) == 6 * dtype.nbytes
        assert byte_size(name, (0, dtype.numbers)) == 0
        for shape in ((), (dtype.numbers, 16), (3, dtype.numbers + 1)):
            with pytest.raises(ValueError, match="no whole number of records"):
                byte_size(name, shape)
        kind = TYPE_OF[name]
        assert (kind.name.lower(), kind.numbers, kind.nbytes) == (name, dtype.numbers, dtype.nbytes)


def test_types_agree_with_dtypes() -> None:
    for number, kind in GGML_TYPES.items():
        assert kind.number == number
        if kind.dtype is not None and kind.dtype not in BLOCK_DTYPES:
            assert (kind.numbers, 8 * kind.nbytes) == (1, DTYPES[kind.dtype].bits)


def test_types_agree_with_gguf() -> None:
    constants = pytest.importorskip("gguf").constants
    theirs = {
        int(kind): (kind.name, *constants.GGML_QUANT_SIZES[kind])
        for kind in constants.GGMLQuantizationType
    }
    assert {n: (k.name, k.numbers, k.nbytes) for n, k in GGML_TYPES.items()} == theirs


GOLDEN_HEADER = (
    b"GGUF"
    + u32(3)
    + u64(2)
    + u64(6)
    + string("general.architecture")
    + u32(8)
    + string("test")
    + string("a.list")
    + u32(9)
    + u32(6)
    + u64(1)
    + struct.pack("<f", 0.5)
    + string("general.alignment")
    + u32(4)
    + u32(64)
    + string("general.file_type")
    + u32(4)
    + u32(7)
    + string("general.quantization_version")
    + u32(4)
    + u32(2)
    + string("zzz")
    + u32(8)
    + string("é")
    + string("a")
    + u32(2)
    + u64(32)
    + u64(3)
    + u32(8)
    + u64(0)
    + string("b")
    + u32(1)
    + u64(5)
    + u32(0)
    + u64(128)
)


def test_golden_header() -> None:
    tensors = [OutputTensor("b", "float32", (5,)), OutputTensor("a", "q8_0", (3, 32))]
    metadata = {
        "zzz": "é",
        "a.list": "gguf:[float32]:[0.5]",
        "general.file_type": "gguf:uint32:1",
        "general.alignment": "gguf:uint32:32",
        "split.count": "gguf:uint16:3",
        **ARCHITECTURE,
    }
    header, offsets = encode_gguf_header(tensors, metadata, 64)
    start = aligned(len(GOLDEN_HEADER), 64)
    assert header == GOLDEN_HEADER.ljust(start, b"\0")
    assert offsets == {"a": start, "b": start + 128}
    plan = plan_gguf_file("x.gguf", tensors, metadata, 64)
    assert (plan.header, plan.offsets, plan.size) == (header, offsets, start + 192)
    assert list(plan.tensors) == ["a", "b"]


@given(st.permutations(["q", "w", "e", "r", "general.x"]))
def test_order_makes_no_difference(names: list[str]) -> None:
    tensors = [OutputTensor(name, "float16", (len(name),)) for name in names]
    header, _ = encode_gguf_header(tensors, {**{name: name for name in names}, **ARCHITECTURE})
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    again, _ = encode_gguf_header(ordered, {**ARCHITECTURE, **{n: n for n in sorted(names)}})
    assert header == again


def test_nothing_is_quantized_without_a_quantized_tensor() -> None:
    metadata = {**ARCHITECTURE, "general.quantization_version": "gguf:uint32:2"}
    header, _ = encode_gguf_header([OutputTensor("a", "int8", (1,))], metadata)
    assert b"general.quantization_version" not in header
    assert b"general.file_type" not in header
    header, _ = encode_gguf_header([OutputTensor("a", "q4_k", (1, 256))], metadata)
    assert b"general.quantization_version" in header


def test_keys_of_the_container() -> None:
    assert is_container_key("general.alignment")
    assert is_container_key("split.no")
    assert not is_container_key("general.name")


REFUSED: dict[str, tuple[str, list[OutputTensor], dict[str, str]]] = {
    "no architecture": ("missing-architecture", [], {}),
    "empty architecture": ("missing-architecture", [], {"general.architecture": ""}),
    "key without characters": ("bad-metadata", [], {**ARCHITECTURE, "": "a"}),
    "key too long": ("bad-metadata", [], {**ARCHITECTURE, "a" * 65_536: "a"}),
    "key is no text": ("bad-metadata", [], {**ARCHITECTURE, "\ud800": "a"}),
    "value is no text": ("bad-metadata", [], {**ARCHITECTURE, "a": "\ud800"}),
    "dtype": ("dtype-not-held", [OutputTensor("a", "float8_e4m3fn", (1,))], ARCHITECTURE),
    "records": ("shape-refused", [OutputTensor("a", "q4_k", (2, 128))], ARCHITECTURE),
    "dimensions": ("shape-refused", [OutputTensor("a", "float32", (1,) * 5)], ARCHITECTURE),
    "long name": ("name-too-long", [OutputTensor("é" * 32, "float32", (1,))], ARCHITECTURE),
    "no name": ("bad-name", [OutputTensor("", "float32", (1,))], ARCHITECTURE),
}


@pytest.mark.parametrize(("kind", "tensors", "metadata"), REFUSED.values(), ids=REFUSED)
def test_what_gguf_does_not_hold_is_refused(
    kind: str, tensors: list[OutputTensor], metadata: dict[str, str]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        encode_gguf_header(tensors, metadata)
    assert [problem.kind for problem in caught.value.problems] == [kind]


def test_longer_names_may_be_asked_for() -> None:
    name = "a" * 127
    header, _ = encode_gguf_header([OutputTensor(name, "float32", (1,))], ARCHITECTURE, 32, 127)
    assert name.encode() in header


@pytest.mark.parametrize("alignment", [0, 4, 48, -32])
def test_alignments_that_are_none(alignment: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        encode_gguf_header([], ARCHITECTURE, alignment)


def test_a_name_twice() -> None:
    tensors: list[Any] = [OutputTensor("a", "float32", (1,))] * 2
    with pytest.raises(ValueError, match="two tensors are called"):
        encode_gguf_header(tensors, ARCHITECTURE)
