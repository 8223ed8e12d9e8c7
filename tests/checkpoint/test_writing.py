from __future__ import annotations

import os
import random
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantrecipe.checkpoint import FileWriter, OutputWriter, open_parts
from quantrecipe.schema.placement import place
from quantrecipe.schema.problems import OutputError
from quantrecipe.schema.tensors import OutputFilePlan, OutputTensor

X = "x.safetensors"
GOLDEN = (
    "8800000000000000"
    "7b225f5f6d657461646174615f5f223a7b2266223a2267227d2c"  # {"__metadata__":{"f":"g"},
    "2277223a7b226474797065223a22463332222c227368617065223a5b315d2c"  # "w":{"dtype":"F32", ...
    "22646174615f6f666673657473223a5b302c345d7d2c"
    "2271223a7b226474797065223a224938222c227368617065223a5b325d2c"  # "q":{"dtype":"I8", ...
    "22646174615f6f666673657473223a5b342c365d7d7d"
)


def one_file(*tensors: OutputTensor) -> OutputFilePlan:
    (plan,), _, _ = place(tensors, {}, "x.safetensors")
    return plan


A = OutputTensor("a", "int8", (8,))
B = OutputTensor("b", "float32", (2,))


@given(st.integers(0, 10_000), st.sampled_from([None, 40, 400]), st.booleans())
def test_blocks_in_any_order_give_the_files_of_safetensors(
    tmp_path_factory: pytest.TempPathFactory, seed: int, limit: int | None, threads: bool
) -> None:
    rng = random.Random(seed)
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.bool]
    data = {
        f"layer.{at}": torch.zeros(rng.randint(0, 5), rng.randint(0, 20), dtype=rng.choice(dtypes))
        for at in range(rng.randint(1, 8))
    }
    raw = {}
    for name, tensor in data.items():
        flat = tensor.reshape(-1).view(torch.uint8)
        flat.random_(0, 2)
        raw[name] = flat.numpy().tobytes()
    outputs = [
        OutputTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in data.items()
    ]
    plans, index, index_path = place(outputs, {"format": "pt"}, "m.safetensors", limit)
    folder = tmp_path_factory.mktemp("out")
    blocks = []
    for name, content in raw.items():
        cuts = sorted({0, len(content), *(rng.randint(0, len(content)) for _ in range(3))})
        blocks += [(name, start, content[start:end]) for start, end in pairwise([*cuts, cuts[-1]])]
    rng.shuffle(blocks)

    where = {name: plan.path for plan in plans for name in plan.tensors}

    def write(block: tuple[str, int, bytes]) -> None:
        writer.write(where[block[0]], *block)

    with OutputWriter(plans, folder) as writer, ThreadPoolExecutor(4) as pool:
        list((pool.map if threads else map)(write, blocks))
        writer.finish()

    for plan in plans:
        expected = folder / "expected"
        save_file({name: data[name] for name in plan.tensors}, expected, {"format": "pt"})
        assert (folder / plan.path).read_bytes() == expected.read_bytes()
        expected.unlink()
    if index is not None and index_path is not None:
        (folder / index_path).write_bytes(index)
    (part,) = open_parts(folder, {"model": "."})
    assert {name: (one.dtype, one.shape) for name, one in part.tensors.items()} == {
        one.name: (one.dtype, one.shape) for one in outputs
    }


def test_transformers_reads_our_shards(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = BertModel(config)
    config.save_pretrained(tmp_path)
    state = model.state_dict()
    outputs = [OutputTensor(name, "float32", tuple(one.shape)) for name, one in state.items()]
    plans, index, index_path = place(outputs, {"format": "pt"}, "model.safetensors", 20_000)
    assert len(plans) > 1
    with OutputWriter(plans, tmp_path) as writer:
        for plan in plans:
            for name in plan.tensors:
                writer.write(plan.path, name, 0, state[name].numpy())
        writer.finish()
    (tmp_path / str(index_path)).write_bytes(index or b"")
    loaded = BertModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_golden_bytes(tmp_path: Path) -> None:
    tensors = [OutputTensor("q", "int8", (2,)), OutputTensor("w", "float32", (1,))]
    plans, _, _ = place(tensors, {"f": "g"}, "x.safetensors")
    with OutputWriter(plans, tmp_path) as writer:
        writer.write(X, "q", 0, np.array([-1, 127], dtype=np.int8))
        writer.write(X, "w", 0, np.array([1.0], dtype=np.float32))
        writer.finish()
    written = (tmp_path / "x.safetensors").read_bytes()
    padding = int.from_bytes(written[:8], "little") - (len(GOLDEN) // 2 - 8)
    assert written.hex() == GOLDEN + "20" * padding + "0000803f" + "ff7f"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_mode_is_that_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        FileWriter(one_file(A), tmp_path).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    ("tensor", "offset", "size", "message"),
    [
        ("a", -1, 2, "bytes -1 to 1 of 8"),
        ("a", 7, 2, "bytes 7 to 9 of 8"),
        ("a", 0, 9, "bytes 0 to 9 of 8"),
        ("c", 0, 1, "holds no tensor 'c'"),
        ("a", 1, 2, "written before"),
    ],
)
def test_writes_that_cannot_be_meant(
    tmp_path: Path, tensor: str, offset: int, size: int, message: str
) -> None:
    with OutputWriter([one_file(A, B)], tmp_path) as writer:
        writer.write(X, "a", 2, bytes(1))
        with pytest.raises(ValueError, match=message):
            writer.write(X, tensor, offset, bytes(size))
    single = FileWriter(one_file(A, B), tmp_path / "again")
    single.write("a", 2, bytes(1))
    with pytest.raises(ValueError, match=message):
        single.write(tensor, offset, bytes(size))
    single.close()


def test_an_unwritten_payload_loads_as_zeros_and_is_refused(tmp_path: Path) -> None:
    with OutputWriter([one_file(A, B)], tmp_path) as writer:
        writer.write(X, "a", 0, b"\1" * 8)
        writer.write(X, "b", 0, b"\1" * 7)
        with pytest.raises(ValueError, match="1 bytes were never written, of b"):
            writer.finish()
        assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [1] * 8
        writer.write(X, "b", 7, b"\1")
        writer.finish()
        with pytest.raises(ValueError, match="written before"):
            writer.write(X, "a", 0, b"1")
        writer.write(X, "a", 8, b"")


def test_a_write_that_failed_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with closing(FileWriter(one_file(A), tmp_path)) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            with pytest.raises(OutputError, match="disk is full"):
                writer.write("a", 0, bytes(8))
        with pytest.raises(ValueError, match="writing failed"):
            writer.finish()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
    with OutputWriter([one_file(A)], tmp_path) as writer:
        writer.write(X, "a", 0, bytes(range(8)))
        writer.finish()
    assert (tmp_path / "x.safetensors").read_bytes()[-8:] == bytes(range(8))


def test_without_the_calls_of_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("pwrite", "posix_fallocate"):
        monkeypatch.delattr(os, call, raising=False)
    with OutputWriter([one_file(A, B)], tmp_path) as writer:
        writer.write(X, "b", 4, b"efgh")
        writer.write(X, "a", 0, b"12345678")
        writer.write(X, "b", 0, b"abcd")
        writer.finish()
    assert (tmp_path / "x.safetensors").read_bytes()[-16:] == b"abcdefgh12345678"


def test_a_file_system_without_preallocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    FileWriter(one_file(A), tmp_path).close()
    assert (tmp_path / "x.safetensors").stat().st_size == one_file(A).size


def test_a_full_disk_shows_before_the_first_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    plan = one_file(OutputTensor("a", "int8", (2**60,)))
    with pytest.raises(OutputError, match=f"{tmp_path}: needs {plan.size:,} bytes, and"):
        OutputWriter([plan], tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"x\.safetensors needs 72 bytes there") as caught:
        OutputWriter([one_file(A)], tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_file_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match="File exists"):
        FileWriter(one_file(A), tmp_path)
    assert (tmp_path / "x.safetensors").read_bytes() == b"mine"


def test_files_and_their_names(tmp_path: Path) -> None:
    (other,), _, _ = place([A], {}, "y.safetensors")
    with OutputWriter([one_file(A), other], tmp_path) as writer:
        writer.write("y.safetensors", "a", 0, b"yyyyyyyy")
        writer.write(X, "a", 0, b"xxxxxxxx")
        with pytest.raises(ValueError, match=r"called 'z\.safetensors'"):
            writer.write("z.safetensors", "a", 0, b"")
        writer.finish()
    assert (tmp_path / "y.safetensors").read_bytes().endswith(b"y" * 8)
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match=r"two files are called 'x\.safetensors'"):
        OutputWriter([one_file(A), one_file(B)], tmp_path / "new")
