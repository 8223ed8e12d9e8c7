from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file

from quantrecipe.checkpoint.errors import SourceError
from quantrecipe.checkpoint.header import read_header
from quantrecipe.schema.dtypes import BY_CODE, DTYPES
from quantrecipe.schema.problems import InvalidInput

A = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
B = {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}
GOLDEN = (
    "4000000000000000"  # 64
    "7b2261223a7b226474797065223a22463332222c227368617065223a5b315d2c"
    "22646174615f6f666673657473223a5b302c345d7d7d20202020202020202020"
    "0000803f"
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=6)


def file_bytes(header: Any, payload: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(payload)


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**A, **changes}}


def text(value: str) -> bytes:
    return value.encode()


def library_accepts(data: bytes) -> bool:
    try:
        deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return False
    return True


# id: (kind, file, whether the safetensors library reads it all the same)
MALFORMED: dict[str, tuple[str, bytes, bool]] = {
    "empty": ("empty-file", b"", False),
    "seven bytes": ("truncated-file", b"\x10" + bytes(6), False),
    "header longer than the file": ("truncated-file", (9).to_bytes(8, "little") + b"{}", False),
    "header too large": ("header-too-large", (10**8 + 1).to_bytes(8, "little") + b"{}", False),
    "largest length": ("header-too-large", b"\xff" * 8 + b"{}", False),
    "no header": ("header-not-json", bytes(8), False),
    "not UTF-8": ("header-not-json", file_bytes(b'{"\xff":1}'), False),
    "UTF-16": ("header-not-json", file_bytes("{}".encode("utf-16-le")), False),
    "byte order mark": ("header-not-json", file_bytes(b"\xef\xbb\xbf{}"), False),
    "not JSON": ("header-not-json", file_bytes(b"{nonsense}"), False),
    "cut JSON": ("bad-tensor-entry", file_bytes(b'{"a":{"dtype":"U8"'), False),
    "key only": ("header-not-json", file_bytes(b'{"a"'), False),
    "comma too many": ("header-not-json", file_bytes(b'{"__metadata__":{},}'), False),
    "no colon": ("header-not-json", file_bytes(b'{"a" {}}'), False),
    "something behind": ("header-not-json", file_bytes(b"{} x"), False),
    "zero padding": ("header-not-json", file_bytes(b"{}\0\0"), False),
    "control character": ("header-not-json", file_bytes(b'{"__metadata__":{"a":"\n"}}'), False),
    "half a surrogate pair": (
        "header-not-json",
        file_bytes(rb'{"__metadata__":{"a":"\ud800"}}'),
        False,
    ),
    "a list": ("header-not-json", file_bytes(b"[]"), False),
    "a string": ("header-not-json", file_bytes(b'"a"'), False),
    "leading space": ("header-not-json", file_bytes(b" {}"), True),
    "entry is a list": ("bad-tensor-entry", file_bytes({"a": []}), False),
    "entry is null": ("bad-tensor-entry", file_bytes({"a": None}), False),
    "entry holds an object": ("bad-tensor-entry", file_bytes(entry(dtype={}), 2), False),
    "entry is endless": ("bad-tensor-entry", file_bytes(entry(shape=[1] * 9000), 2), False),
    "entry of nothing": ("bad-tensor-entry", file_bytes({"a": {}}), False),
    "dtype is null": ("unknown-dtype", file_bytes(entry(dtype=None), 2), False),
    "no shape": ("bad-tensor-entry", file_bytes(b'{"a":{"dtype":"U8"}}', 2), False),
    "unknown field": ("bad-tensor-entry", file_bytes(entry(more=1), 2), True),
    "unknown dtype": ("unknown-dtype", file_bytes(entry(dtype="U9"), 2), False),
    "dtype in lower case": ("unknown-dtype", file_bytes(entry(dtype="u8"), 2), False),
    "dtype is a number": ("unknown-dtype", file_bytes(entry(dtype=8), 2), False),
    "negative size": ("bad-shape", file_bytes(entry(shape=[-2]), 2), False),
    "two negative sizes": ("bad-shape", file_bytes(entry(shape=[-2, -1]), 2), False),
    "minus zero": (
        "bad-shape",
        file_bytes(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
        False,
    ),
    "fraction": ("bad-shape", file_bytes(entry(shape=[2.0]), 2), False),
    "text as size": ("bad-shape", file_bytes(entry(shape=["2"]), 2), False),
    "true as size": ("bad-shape", file_bytes(entry(shape=[True, 2]), 2), False),
    "shape is a number": ("bad-shape", file_bytes(entry(shape=2), 2), False),
    "leading zero": (
        "header-not-json",
        file_bytes(b'{"a":{"dtype":"U8","shape":[02],"data_offsets":[0,2]}}', 2),
        False,
    ),
    "NaN": (
        "header-not-json",
        file_bytes(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}', 2),
        False,
    ),
    "product overflows": ("bad-shape", file_bytes(entry(shape=[2**32, 2**32]), 2), False),
    "bytes overflow": (
        "bad-shape",
        file_bytes(entry(dtype="F64", shape=[2**61], data_offsets=[0, 0])),
        False,
    ),
    "size over 64 bits": ("bad-shape", file_bytes(entry(shape=[2**64 + 2]), 2), False),
    "size of 5000 digits": (
        "header-not-json",
        file_bytes(text('{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,2]}}' % ("9" * 5000))),
        False,
    ),
    "deeply nested": (
        "header-not-json",
        file_bytes(b'{"a":{"dtype":"U8","shape":' + b"[" * 9000 + b"]" * 5000 + b"}}"),
        False,
    ),
    "very deeply nested": (
        "bad-tensor-entry",
        file_bytes(b'{"a":{"dtype":' + b"[" * 200_000 + b"}}"),
        False,
    ),
    "nested objects": ("bad-tensor-entry", file_bytes(b'{"a":' * 100_000 + b"}"), False),
    "one offset": ("bad-offsets", file_bytes(entry(data_offsets=[2]), 2), False),
    "three offsets": ("bad-offsets", file_bytes(entry(data_offsets=[0, 2, 2]), 2), False),
    "offsets reversed": ("bad-offsets", file_bytes(entry(data_offsets=[2, 0]), 2), False),
    "negative offset": ("bad-offsets", file_bytes(entry(data_offsets=[-2, 0]), 2), False),
    "offsets too far apart": ("bad-offsets", file_bytes(entry(data_offsets=[0, 3]), 3), False),
    "offsets too near": ("bad-offsets", file_bytes(entry(dtype="F32"), 2), False),
    "torn sub-byte": (
        "unaligned-tensor",
        file_bytes(entry(dtype="F4", shape=[3], data_offsets=[0, 2]), 2),
        False,
    ),
    "hole at the start": ("hole", file_bytes({"b": B}, 4), False),
    "hole": ("hole", file_bytes({"a": A, "b": {**B, "data_offsets": [3, 5]}}, 5), False),
    "overlap": ("overlap", file_bytes({"a": A, "b": {**B, "data_offsets": [1, 3]}}, 3), False),
    "same place": ("overlap", file_bytes({"a": A, "b": A}, 2), False),
    "trailing byte": ("trailing-bytes", file_bytes({"a": A}, 3), False),
    "only trailing bytes": ("trailing-bytes", file_bytes({}, 1), False),
    "truncated": ("truncated-file", file_bytes({"a": A, "b": B}, 3), False),
    "metadata of numbers": ("bad-metadata", file_bytes({"__metadata__": {"a": 1}}), False),
    "metadata of objects": ("bad-metadata", file_bytes({"__metadata__": {"a": {}}}), False),
    "metadata is a list": ("header-not-json", file_bytes({"__metadata__": []}), False),
    "metadata is null": ("header-not-json", file_bytes({"__metadata__": None}), True),
    "tensor twice": (
        "duplicate-key",
        file_bytes(text(f'{{"a":{json.dumps(A)},"a":{json.dumps(A)}}}'), 2),
        True,
    ),
    "tensor twice, escaped": (
        "duplicate-key",
        file_bytes(text(f'{{"a":{json.dumps(A)},"\\u0061":{json.dumps(A)}}}'), 2),
        True,
    ),
    "field twice": (
        "duplicate-key",
        file_bytes(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        False,
    ),
    "metadata key twice": ("duplicate-key", file_bytes(b'{"__metadata__":{"a":"","a":""}}'), True),
    "metadata twice": (
        "duplicate-key",
        file_bytes(b'{"__metadata__":{},"__metadata__":{}}'),
        False,
    ),
    "LFS pointer": (
        "not-safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        False,
    ),
    "zip": ("not-safetensors", b"PK\x03\x04" + b"\x14\0\0\0\x08\x08" + bytes(90), False),
    "pickle": ("not-safetensors", b"\x80\x02}q\0(X\x01\0\0\0aq\x01" + bytes(90), False),
    "HTML": ("not-safetensors", b"<!DOCTYPE html><html>not found</html>", False),
    "JSON": ("not-safetensors", b'{"weight_map": {}}', False),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case: str, tmp_path: Path) -> None:
    kind, data, accepted = MALFORMED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidInput) as caught:
        read_header(path)
    assert [problem.kind for problem in caught.value.problems] == [kind]
    assert all(problem.file == str(path) for problem in caught.value.problems)
    assert library_accepts(data) == accepted


WELL_FORMED: dict[str, bytes] = {
    "no tensors": file_bytes({}),
    "unaligned": file_bytes(b"{}"),
    "padded with white space": file_bytes(b"{ }\t\n\r "),
    "any order": file_bytes({"b": B, "a": A}, 4),
    "spaces everywhere": file_bytes(
        b'{ "a"\n: { "shape":[ ] , "dtype":"U8" ,\t"data_offsets":[ 0 , 1]} } ', 1
    ),
    "metadata last": file_bytes({"a": A, "__metadata__": {"k": "{v}"}}, 2),
    "empty metadata": file_bytes({"__metadata__": {}}),
    "empty tensors at one place": file_bytes(
        {name: {**A, "shape": [0], "data_offsets": [0, 0]} for name in "cab"}
    ),
    "empty tensor of large sizes": file_bytes(entry(shape=[0, 2**20, 2**20], data_offsets=[0, 0])),
    "empty name": file_bytes({"": A}, 2),
    "escapes": file_bytes(
        rb'{"\u00fc\ud83d\ude00\/\"":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1
    ),
}


@pytest.mark.parametrize("case", WELL_FORMED)
def test_odd_files_are_read_as_the_library_reads_them(case: str, tmp_path: Path) -> None:
    data = WELL_FORMED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    info = read_header(path)
    theirs = dict(deserialize(data))  # type: ignore[no-untyped-call]
    assert {
        name: (BY_CODE[tensor["dtype"]].name, tuple(tensor["shape"]), len(tensor["data"]))
        for name, tensor in theirs.items()
    } == {name: (one.dtype, one.shape, one.nbytes) for name, one in info.tensors.items()}
    offsets = [tensor.offset for tensor in info.tensors.values()]
    assert offsets == sorted(offsets)


@given(
    st.dictionaries(
        TEXTS.filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(["float32", "bfloat16", "int8", "bool", "float8_e4m3fn", "int64"]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=6,
    ),
    st.none() | st.dictionaries(TEXTS, TEXTS, max_size=3),
)
def test_saved_files_are_read_back(tmp_path_factory, tensors, metadata) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("saved") / "x.safetensors"
    data = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype))
        for name, (dtype, shape) in tensors.items()
    }
    save_file(data, path, metadata or None)  # {} without tensors makes the library write nonsense
    info = read_header(path)
    assert info.metadata == (metadata or {})
    assert {name: (one.dtype, list(one.shape)) for name, one in info.tensors.items()} == tensors
    assert all(one.nbytes == data[name].nbytes for name, one in info.tensors.items())
    assert sum(one.nbytes for one in info.tensors.values()) == path.stat().st_size - min(
        [one.offset for one in info.tensors.values()], default=path.stat().st_size
    )


def test_a_golden_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes.fromhex(GOLDEN))
    info = read_header(path, "below/x.safetensors")
    assert info.relative == "below/x.safetensors"
    assert (info.size, info.mtime_ns) == (76, path.stat().st_mtime_ns)
    assert info.header_sha256 == hashlib.sha256(bytes.fromhex(GOLDEN)[:72]).hexdigest()
    tensor = info.tensors["a"]
    assert (tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes) == ("float32", (1,), 72, 4)
    assert tensor.file == path
    assert read_header(path).relative == "x.safetensors"


def test_every_problem_is_reported_at_once_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes({f"t{at}": {**A, "dtype": "Q4"} for at in range(50)}, 2))
    with pytest.raises(InvalidInput) as caught:
        read_header(path)
    kinds = [problem.kind for problem in caught.value.problems]
    assert kinds == ["unknown-dtype"] * 20 + ["more-problems"]
    assert caught.value.problems[0].tensor == "t0"
    assert "30 more" in caught.value.problems[-1].message


def test_an_unknown_dtype_is_named_with_its_near_miss(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(entry(dtype="F8_E4M3FN"), 2))
    with pytest.raises(InvalidInput, match="F8_E4M3FN") as caught:
        read_header(path)
    assert "Did you mean 'F8_E4M3" in str(caught.value)


@pytest.mark.parametrize(
    ("case", "advice"),
    [
        ("LFS pointer", "git lfs pull"),
        ("pickle", "nothing is ever unpickled"),
        ("zip", "nothing is ever unpickled"),
    ],
)
def test_foreign_files_come_with_advice(case: str, advice: str, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(MALFORMED[case][1])
    with pytest.raises(InvalidInput, match=advice):
        read_header(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_bytes(b"x")
    for name, kind in {
        ".": "not-a-file",
        "absent": "missing-file",
        "link": "missing-file",
        "file/below": "missing-file",
    }.items():
        with pytest.raises(InvalidInput) as caught:
            read_header(tmp_path / name)
        assert caught.value.problems[0].kind == kind
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(InvalidInput, match="not a regular file"):
            read_header(tmp_path / "fifo")


def test_a_symlink_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(bytes.fromhex(GOLDEN))
    (tmp_path / "x.safetensors").symlink_to("blob")
    assert read_header(tmp_path / "x.safetensors").size == 76


def test_an_unreadable_file_is_an_input_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes.fromhex(GOLDEN))

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(SourceError, match="Permission denied") as caught:
        read_header(path)
    assert caught.value.exit_code == 3


def test_a_hostile_header_costs_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "x.safetensors"
    size = 3_000_000
    path.write_bytes(file_bytes(b'{"a":{"dtype":"U8","shape":[' + b"[]," * (size // 3) + b"[]]}}"))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * size


def test_all_dtypes_are_read(tmp_path: Path) -> None:
    header, position = {}, 0
    for name, dtype in DTYPES.items():
        header[name] = {
            "dtype": dtype.code,
            "shape": [8],
            "data_offsets": [position, position + dtype.bits],
        }
        position += dtype.bits
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(header, position))
    assert library_accepts(path.read_bytes())
    assert {one.name: one.dtype for one in read_header(path).tensors.values()} == {
        name: name for name in DTYPES
    }
