from __future__ import annotations

import os
import random
import stat
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantrecipe.checkpoint import OutputFiles, lay_out, open_parts
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

    where = {name: (plan.path, plan.offsets[name]) for plan in plans for name in plan.tensors}

    def write(block: tuple[str, int, bytes]) -> None:
        name, start, content = block
        path, offset = where[name]
        files.write(path, offset + start, content)

    lay_out(plans, folder)
    with OutputFiles(folder) as files, ThreadPoolExecutor(4) as pool:
        list((pool.map if threads else map)(write, blocks))

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
    lay_out(plans, tmp_path)
    with OutputFiles(tmp_path) as files:
        for plan in plans:
            for name in plan.tensors:
                files.write(plan.path, plan.offsets[name], state[name].numpy())
    (tmp_path / str(index_path)).write_bytes(index or b"")
    loaded = BertModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_golden_bytes(tmp_path: Path) -> None:
    tensors = [OutputTensor("q", "int8", (2,)), OutputTensor("w", "float32", (1,))]
    (plan,), _, _ = place(tensors, {"f": "g"}, "x.safetensors")
    lay_out([plan], tmp_path)
    with OutputFiles(tmp_path) as files:
        files.write(X, plan.offsets["q"], np.array([-1, 127], dtype=np.int8))
        files.write(X, plan.offsets["w"], np.array([1.0], dtype=np.float32))
    written = (tmp_path / "x.safetensors").read_bytes()
    padding = int.from_bytes(written[:8], "little") - (len(GOLDEN) // 2 - 8)
    assert written.hex() == GOLDEN + "20" * padding + "0000803f" + "ff7f"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_mode_is_that_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        lay_out([one_file(A)], tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o666 & ~umask


def test_an_unwritten_payload_loads_as_zeros(tmp_path: Path) -> None:
    """Why whoever publishes has to know that all of it was written."""
    lay_out([one_file(A, B)], tmp_path)
    assert load_file(tmp_path / X)["a"].tolist() == [0] * 8


def test_what_was_laid_out_before_is_gone_on_with(tmp_path: Path) -> None:
    plan = one_file(A)
    lay_out([plan], tmp_path)
    with OutputFiles(tmp_path) as files:
        files.write(X, plan.offsets["a"], b"12345678")
    lay_out([plan], tmp_path)
    assert (tmp_path / X).read_bytes().endswith(b"12345678")


@pytest.mark.parametrize("content", [b"", b"short", None, "link"], ids=str)
def test_whatever_else_is_there_is_laid_out_anew(
    tmp_path: Path, content: bytes | str | None
) -> None:
    """Another header, another size, or a link out of the folder."""
    plan, elsewhere = one_file(A), tmp_path / "elsewhere"
    if content is None:
        (tmp_path / X).write_bytes(bytes(plan.size))
    elif isinstance(content, str):
        elsewhere.write_bytes(plan.header + bytes(8))
        (tmp_path / X).symlink_to(elsewhere)
    else:
        (tmp_path / X).write_bytes(content)
    lay_out([plan], tmp_path)
    assert (tmp_path / X).read_bytes() == plan.header + bytes(8)
    assert not (tmp_path / X).is_symlink()


def test_a_write_that_fails_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    lay_out([one_file(A)], tmp_path)
    with OutputFiles(tmp_path) as files, monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(OutputError, match="disk is full") as caught:
            files.write(X, 80, bytes(8))
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_is_gone_is_an_output_error(tmp_path: Path) -> None:
    with OutputFiles(tmp_path) as files, pytest.raises(OutputError, match="No such file"):
        files.write(X, 0, b"1")


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
    plan = one_file(A)
    lay_out([plan], tmp_path)
    with OutputFiles(tmp_path) as files:
        files.write(X, plan.offsets["a"], bytes(range(8)))
    assert (tmp_path / "x.safetensors").read_bytes()[-8:] == bytes(range(8))


def test_without_the_calls_of_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("pwrite", "posix_fallocate", "fdatasync"):
        monkeypatch.delattr(os, call, raising=False)
    plan = one_file(A, B)
    lay_out([plan], tmp_path)
    with OutputFiles(tmp_path) as files:
        files.write(X, plan.offsets["b"] + 4, b"efgh")
        files.write(X, plan.offsets["a"], b"12345678")
        files.write(X, plan.offsets["b"], b"abcd")
        files.sync([X])
    assert (tmp_path / "x.safetensors").read_bytes()[-16:] == b"abcdefgh12345678"


def test_a_file_system_without_preallocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    lay_out([one_file(A)], tmp_path)
    assert (tmp_path / "x.safetensors").stat().st_size == one_file(A).size


def test_a_full_disk_shows_before_the_first_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    plan = one_file(OutputTensor("a", "int8", (2**60,)))
    with pytest.raises(OutputError, match=f"{tmp_path}: needs {plan.size:,} bytes, and"):
        lay_out([plan], tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"x\.safetensors needs 72 bytes there") as caught:
        lay_out([one_file(A)], tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 3


def test_two_files_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two files are called 'x\.safetensors'"):
        lay_out([one_file(A), one_file(B)], tmp_path)


def test_closed_files_open_again(tmp_path: Path) -> None:
    plan = one_file(A)
    lay_out([plan], tmp_path)
    with OutputFiles(tmp_path) as files:
        files.write(X, plan.offsets["a"], b"1234")
        files.close([X, "never opened"])
        files.write(X, plan.offsets["a"] + 4, b"5678")
        files.write(X, plan.size, b"")
    assert (tmp_path / X).read_bytes().endswith(b"12345678")
