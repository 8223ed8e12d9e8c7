from __future__ import annotations

import hashlib
import os
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantrecipe.checkpoint import gguf, gguf_scan
from quantrecipe.checkpoint.gguf import read_gguf_header, read_gguf_header_bytes
from quantrecipe.schema.dtypes import BLOCK_DTYPES
from quantrecipe.schema.gguf import TYPE_OF, is_container_key, plan_gguf_file
from quantrecipe.schema.gguf_values import SCALARS, pack_value, string_text
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.tensors import OutputTensor

U8, BOOL, STRING, ARRAY, U32, F32 = 0, 7, 8, 9, 4, 6
TEXTS = st.text(st.characters(codec="utf-8"), max_size=6)


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def string(text: str | bytes) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return u64(len(encoded)) + encoded


def value(key: str | bytes, number: int, packed: bytes) -> bytes:
    return string(key) + u32(number) + packed


def tensor(
    name: str | bytes = "a", dims: Sequence[int] = (8,), number: int = 0, offset: int = 0
) -> bytes:
    packed = b"".join(map(u64, dims))
    return string(name) + u32(len(dims)) + packed + u32(number) + u64(offset)


def file(
    values: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    payload: int = 0,
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    counts = u64(len(tensors)) + u64(len(values))
    header = b"GGUF" + u32(version) + counts + b"".join(values) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + bytes(payload)


ALIGN = "general.alignment"
ARRAYS = u32(ARRAY) + u64(1)

# id: (kind, file)
MALFORMED: dict[str, tuple[str, bytes]] = {
    "empty": ("empty-file", b""),
    "three bytes": ("not-gguf", b"GGU"),
    "something else": ("not-gguf", b"GGML" + bytes(60)),
    "magic only": ("truncated-file", b"GGUF"),
    "version 1": ("unsupported-version", file(version=1)),
    "version 4": ("unsupported-version", file(version=4)),
    "big-endian": ("unsupported-version", b"GGUF" + b"\0\0\0\3" + bytes(40)),
    "no counts": ("truncated-file", b"GGUF" + u32(3) + bytes(4)),
    "more tensors than bytes": ("truncated-file", b"GGUF" + u32(3) + u64(9) + u64(0) + bytes(99)),
    "more values than bytes": ("truncated-file", b"GGUF" + u32(3) + u64(0) + u64(9) + bytes(99)),
    "endless tensors": ("header-too-large", b"GGUF" + u32(3) + u64(2**64 - 1) + u64(0) + bytes(9)),
    "endless values": ("header-too-large", b"GGUF" + u32(3) + u64(0) + u64(2**63) + bytes(9)),
    "endless key": ("bad-string", file([u64(2**63) + bytes(90)])),
    "key too long": ("bad-string", file([value("k" * 65_536, U8, b"1")])),
    "key beyond the file": ("truncated-file", file([u64(200) + bytes(90)])),
    "key is no text": ("bad-string", file([value(b"\xff", U8, b"1")])),
    "string is no text": ("bad-string", file([value("k", STRING, string(b"\xff"))])),
    "endless string": ("bad-string", file([value("k", STRING, u64(2**62))])),
    "string beyond the file": ("truncated-file", file([value("k", STRING, u64(1000))])),
    "unknown type of value": ("bad-value", file([value("k", 13, bytes(8))])),
    "bool of 2": ("bad-value", file([value("k", BOOL, b"\2")])),
    "endless array": ("header-too-large", file([value("k", ARRAY, u32(U8) + u64(2**64 - 1))])),
    "array beyond the file": ("truncated-file", file([value("k", ARRAY, u32(F32) + u64(100))])),
    "strings beyond the file": ("truncated-file", file([value("k", ARRAY, u32(STRING) + u64(9))])),
    "arrays beyond the file": ("truncated-file", file([value("k", ARRAY, u32(ARRAY) + u64(9))])),
    "array of no type": ("bad-value", file([value("k", ARRAY, u32(99) + u64(1) + bytes(50))])),
    "nested arrays": ("bad-value", file([value("k", ARRAY, ARRAYS * 9 + u32(U8) + u64(0))])),
    "key twice": ("duplicate-key", file([value("k", U8, b"1")] * 2)),
    "alignment 0": ("bad-alignment", file([value(ALIGN, U32, u32(0))])),
    "alignment 48": ("bad-alignment", file([value(ALIGN, U32, u32(48))])),
    "alignment of a gigabyte": ("bad-alignment", file([value(ALIGN, U32, u32(1 << 30))])),
    "alignment of another type": ("bad-alignment", file([value(ALIGN, 10, u64(32))])),
    "alignment is text": ("bad-alignment", file([value(ALIGN, STRING, string("uint32:32"))])),
    "name too long": ("bad-string", file([], [tensor("n" * 65_536)], 32)),
    "no name": ("bad-name", file([], [tensor("")], 32)),
    "name twice": ("duplicate-key", file([], [tensor(), tensor(offset=32)], 64)),
    "too many dimensions": ("bad-shape", file([], [tensor(dims=(1,) * 9)], 32)),
    "endless dimensions": ("bad-shape", file([], [string("a") + u32(2**32 - 1) + bytes(99)])),
    "product overflows": ("bad-shape", file([], [tensor(dims=(2**32, 2**32))], 32)),
    "bytes overflow": ("bad-shape", file([], [tensor(dims=(2**62,))], 32)),
    "no whole records": ("bad-shape", file([], [tensor(dims=(16, 2), number=8)], 34)),
    "records of one number": ("bad-shape", file([], [tensor(dims=(), number=12)], 144)),
    "type given up": ("unknown-dtype", file([], [tensor(number=4)], 32)),
    "no such type": ("unknown-dtype", file([], [tensor(number=2**31)], 32)),
    "type that is not read": ("unsupported-dtype", file([], [tensor(dims=(256,), number=13)], 176)),
    "offset too large": ("bad-offsets", file([], [tensor(offset=2**63)], 32)),
    "offset between": ("bad-offsets", file([], [tensor(offset=8)], 64)),
    "not aligned as said": (
        "bad-offsets",
        file([value(ALIGN, U32, u32(64))], [tensor(offset=32)], 64, alignment=64),
    ),
    "overlap": ("overlap", file([], [tensor(dims=(16,)), tensor("b", offset=32)], 64)),
    "same place": ("overlap", file([], [tensor(), tensor("b")], 32)),
    "hole": ("hole", file([], [tensor(), tensor("b", offset=64)], 96)),
    "hole before the first": ("hole", file([], [tensor(offset=32)], 64)),
    "no payload": ("truncated-file", file([], [tensor()])),
    "a byte short": ("truncated-file", file([], [tensor()], 31)),
    "a byte more": ("trailing-bytes", file([], [tensor()], 33)),
    "payload without tensors": ("trailing-bytes", file([], [], 1)),
    "info cut": ("truncated-file", file([], [tensor()])[:-20]),
}


@pytest.mark.parametrize(("kind", "data"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_files_are_refused(kind: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput) as caught:
            read_gguf_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [problem.kind for problem in caught.value.problems] == [kind]
    assert all(problem.file == str(path) for problem in caught.value.problems)
    assert peak < 5_000_000


def test_errors_say_where_and_what(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(file([value("k", STRING, u64(1000))]))
    with pytest.raises(InvalidInput, match=r"at byte 45: metadata 'k': a string, 1,000 bytes"):
        read_gguf_header(path)
    tensors = [tensor(dims=(256, 3), number=13), tensor("b", number=99, offset=544)]
    path.write_bytes(file([], tensors, 544))
    with pytest.raises(InvalidInput) as caught:
        read_gguf_header(path)
    first, second = caught.value.problems
    assert (first.tensor, second.tensor) == ("a", "b")
    assert first.message.startswith("is stored as Q5_K, 176 bytes for 256 numbers")
    assert first.message.endswith("(byte 24 of the file describes it)")
    assert first.hint is not None
    assert "Q4_K" in first.hint


def test_many_problems_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(file([], [tensor()] + [tensor(number=4)] * 1500, 32))
    with pytest.raises(InvalidInput) as caught:
        read_gguf_header(path)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1].kind == "more-problems"


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, kind in ((tmp_path, "not-a-file"), (tmp_path / "no.gguf", "missing-file")):
        with pytest.raises(InvalidInput) as caught:
            read_gguf_header(path)
        assert [problem.kind for problem in caught.value.problems] == [kind]


@pytest.mark.parametrize(
    ("limit", "data"),
    [
        ("MAX_HEADER_BYTES", file([value("k", STRING, string("a" * 600))])),
        ("MAX_HEADER_BYTES", file([], [tensor("n" * 50 + str(n)) for n in range(9)], 600)),
        ("MAX_ELEMENTS", file([value("k", ARRAY, u32(U8) + u64(600) + bytes(600))])),
        ("MAX_ELEMENTS", file([value(k, ARRAY, u32(U8) + u64(300) + bytes(300)) for k in "ab"])),
        ("MAX_METADATA_CHARACTERS", file([value("k", STRING, string("a" * 600))])),
        ("MAX_METADATA_CHARACTERS", file([value("k", ARRAY, u32(U8) + u64(400) + bytes(400))])),
    ],
)
def test_limits(limit: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_scan, limit, 500)
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(InvalidInput) as caught:
        read_gguf_header(path)
    assert [problem.kind for problem in caught.value.problems] == ["header-too-large"]


@pytest.mark.parametrize(
    "start",
    [
        b"GGUF" + u32(3) + u64(0) + u64(1) + value("k", STRING, u64(5 << 30)),
        b"GGUF" + u32(3) + u64(0) + u64(1) + value("k", ARRAY, u32(U8) + u64(5 << 30)),
        b"GGUF" + u32(3) + u64(gguf.MAX_TENSORS) + u64(0),
    ],
    ids=["string", "array", "tensors"],
)
def test_large_files_get_no_more_memory(start: bytes, tmp_path: Path) -> None:
    """The file is large enough for what it claims; it takes no room."""
    path = tmp_path / "a.gguf"
    path.write_bytes(start)
    os.truncate(path, 10 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput):
            read_gguf_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


def test_a_file_is_described(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    values = [value(ALIGN, U32, u32(64)), value("k", STRING, string("gguf:"))]
    tensors = [
        tensor("second", (32, 3, 2), 8, 64),
        tensor("first", (3, 2), 30, 0),
        tensor("none", (0, 5), 0, 0),
        tensor("one", (), 28, 320),
    ]
    data = file(values, tensors, 328, version=2, alignment=64)
    path.write_bytes(data)
    found, header = read_gguf_header_bytes(path, "sub/a.gguf")
    start = len(data) - 328
    assert header == data[:start]
    assert found.header_sha256 == hashlib.sha256(header).hexdigest()
    assert found.metadata == {ALIGN: "gguf:uint32:64", "k": "gguf:string:gguf:"}
    assert (found.relative, found.size) == ("sub/a.gguf", len(data))
    described = [
        (info.name, info.dtype, info.shape, info.offset - start, info.nbytes)
        for info in found.tensors.values()
    ]
    assert described == [
        ("none", "float32", (5, 0), 0, 0),
        ("first", "bfloat16", (2, 3), 0, 12),
        ("second", "q8_0", (2, 3, 32), 64, 204),
        ("one", "float64", (), 320, 8),
    ]


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for data in (file(), file()[:24]):
        path.write_bytes(data)
        assert not read_gguf_header(path).tensors


@st.composite
def packed_values(draw: st.DrawFn, depth: int = 0) -> tuple[int, bytes]:
    """The number of a type and a value of it, packed here."""
    number = draw(st.sampled_from([*SCALARS, STRING, ARRAY] if depth < 3 else [*SCALARS, STRING]))
    if number == STRING:
        return number, string(draw(TEXTS | st.just("gguf:uint8:1")))
    if number != ARRAY:
        return number, draw(packed_scalar(number))
    element = draw(st.sampled_from([*SCALARS, STRING, ARRAY]))
    count = draw(st.integers(0, 3))
    if element == ARRAY:
        inner = draw(st.lists(packed_arrays(depth + 1), min_size=count, max_size=count))
        return number, u32(element) + u64(count) + b"".join(inner)
    each = TEXTS.map(string) if element == STRING else packed_scalar(element)
    values = draw(st.lists(each, min_size=count, max_size=count))
    return number, u32(element) + u64(count) + b"".join(values)


def packed_arrays(depth: int) -> st.SearchStrategy[bytes]:
    return packed_values(depth).filter(lambda found: found[0] == ARRAY).map(lambda found: found[1])


def packed_scalar(number: int) -> st.SearchStrategy[bytes]:
    if number == BOOL:
        return st.sampled_from([b"\0", b"\1"])
    size = SCALARS[number].nbytes
    edges = st.sampled_from([bytes(size), b"\xff" * size, bytes(size - 1) + b"\x80"])
    return st.binary(min_size=size, max_size=size) | edges


@given(values=st.lists(packed_values(), max_size=5))
def test_every_value_survives_as_text(
    values: list[tuple[int, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "values.gguf"
    path.write_bytes(file([value(f"k{i}", *each) for i, each in enumerate(values)]))
    metadata = read_gguf_header(path).metadata
    assert len(metadata) == len(values)
    for i, (number, packed) in enumerate(values):
        assert pack_value(metadata[f"k{i}"]) == u32(number) + packed


@st.composite
def output_tensors(draw: st.DrawFn, name: str) -> OutputTensor:
    dtype = draw(st.sampled_from(sorted(TYPE_OF)))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    if dtype in BLOCK_DTYPES:
        shape = [*shape[:3], draw(st.integers(0, 2)) * BLOCK_DTYPES[dtype].numbers]
    return OutputTensor(name, dtype, tuple(shape))


@st.composite
def outputs(draw: st.DrawFn) -> list[OutputTensor]:
    names = draw(st.lists(TEXTS.filter(bool), unique=True, max_size=5))
    return [draw(output_tensors(name)) for name in names]


@given(
    tensors=outputs(),
    metadata=st.dictionaries(TEXTS.filter(bool), TEXTS.map(string_text), max_size=4),
    alignment=st.sampled_from([8, 32, 256]),
)
def test_what_is_written_is_read(
    tensors: list[OutputTensor],
    metadata: dict[str, str],
    alignment: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    metadata = {"general.architecture": "test"} | metadata
    plan = plan_gguf_file("written.gguf", tensors, metadata, alignment)
    path = tmp_path_factory.getbasetemp() / plan.path
    path.write_bytes(plan.header)
    os.truncate(path, plan.size)
    found, header = read_gguf_header_bytes(path)
    assert header == plan.header
    kept = {key: text for key, text in found.metadata.items() if not is_container_key(key)}
    assert kept == metadata
    assert found.metadata[ALIGN] == f"gguf:uint32:{alignment}"
    described = {
        info.name: (info.dtype, info.shape, info.nbytes, info.offset)
        for info in found.tensors.values()
    }
    assert described == {
        each.name: (each.dtype, each.shape, each.nbytes, plan.offsets[each.name])
        for each in tensors
    }


WHOLE = file(
    [
        value("general.architecture", STRING, string("test")),
        value(ALIGN, U32, u32(32)),
        value("list", ARRAY, u32(STRING) + u64(2) + string("a") + string("b")),
        value("nested", ARRAY, ARRAYS + u32(F32) + u64(1) + bytes(4)),
        value("flag", BOOL, b"\1"),
    ],
    [tensor("a", (32, 2), 8), tensor("b", (3,), 0, 96)],
    128,
)


def _refused_or_read(data: bytes, path: Path) -> Any:
    path.write_bytes(data)
    try:
        return read_gguf_header(path)
    except InvalidInput:
        return None


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    assert _refused_or_read(WHOLE, tmp_path / "a.gguf") is not None
    payload_end = len(WHOLE) - 20  # what follows is padding
    for length in range(len(WHOLE)):
        read = _refused_or_read(WHOLE[:length], tmp_path / "a.gguf")
        assert (read is not None) == (length >= payload_end)


@given(
    places=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 129), st.integers(0, 255)), min_size=1, max_size=4
    )
)
@settings(max_examples=300)
def test_changed_bytes_give_a_clear_error_or_another_file(
    places: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(WHOLE)
    for place, byte in places:
        data[place] = byte
    found = _refused_or_read(bytes(data), tmp_path_factory.getbasetemp() / "changed.gguf")
    if found is not None:
        assert all(info.offset + info.nbytes <= len(data) for info in found.tensors.values())
        assert all(pack_value(text) for text in found.metadata.values())


@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_clear_error(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    _refused_or_read(b"GGUF" + u32(3) + data, path)
