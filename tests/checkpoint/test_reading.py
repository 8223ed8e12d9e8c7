from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantrecipe.checkpoint import SourceError, SourceReader, read_header
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.tensors import SourceFileInfo, TensorInfo


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(100, dtype=torch.int32), "b": torch.zeros(0)}, path)
    return path


@pytest.fixture(params=["preadv", "seek"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "seek":
        for call in ("preadv", "posix_fadvise"):
            monkeypatch.delattr(os, call, raising=False)
    return str(request.param)


def kind_of(info: SourceFileInfo, tensor: TensorInfo) -> str:
    with SourceReader([info]) as reader, pytest.raises(InvalidInput) as caught:
        reader.read_into(tensor, 0, bytearray(tensor.nbytes))
    (problem,) = caught.value.problems
    assert (problem.file, problem.tensor) == (str(info.path), tensor.name)
    return problem.kind


@pytest.mark.usefixtures("system")
def test_any_range_is_read_exactly(path: Path) -> None:
    info = read_header(path)
    expected = np.arange(100, dtype=np.int32).tobytes()

    @given(st.integers(0, 400), st.integers(0, 400))
    def check(start: int, end: int) -> None:
        start, end = min(start, end), max(start, end)
        buffer = bytearray(b"\xaa" * (end - start))
        reader.read_into(info.tensors["a"], start, buffer)
        assert buffer == expected[start:end]

    with SourceReader([info]) as reader:
        check()


@pytest.mark.usefixtures("system")
def test_any_range_of_what_lies_in_several_places_is_read_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    infos, pieces, expected = [], [], b""
    for index, (size, times) in enumerate([(40, 1), (0, 1), (4, 7), (13, 1), (2, 1), (3, 30)]):
        content = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
        file = tmp_path / f"{index % 2}-{index}.safetensors"
        save_file({"before": torch.zeros(8), "x": content}, file)
        infos.append(read_header(file))
        x = infos[-1].tensors["x"]
        pieces.append(replace(x, shape=(size * times,), nbytes=size * times, times=times))
        expected += bytes(content.tolist()) * times
    nested = replace(pieces[0], nbytes=40 + 0 + 28, pieces=tuple(pieces[:3]))
    whole = replace(nested, nbytes=len(expected), pieces=(nested, *pieces[3:]))

    @given(st.integers(0, len(expected)), st.integers(0, len(expected)))
    def check(start: int, end: int) -> None:
        start, end = min(start, end), max(start, end)
        buffer = bytearray(b"\xaa" * (end - start))
        reader.announce(whole, start, end - start)
        reader.read_into(whole, start, buffer)
        assert buffer == expected[start:end]

    with SourceReader(infos, max_open=2) as reader:
        check()
        with pytest.raises(ValueError, match="bytes"):
            reader.read_into(whole, 1, bytearray(len(expected)))


@pytest.mark.usefixtures("system")
def test_many_threads_share_few_open_files(tmp_path: Path) -> None:
    infos = []
    for number in range(6):
        file = tmp_path / f"{number}.safetensors"
        save_file({"a": torch.full((1000,), number, dtype=torch.int64)}, file)
        infos.append(read_header(file))

    def read(at: int) -> bool:
        number, start = at % 6, at % 90
        buffer = np.empty(100, dtype=np.int64)
        reader.read_into(infos[number].tensors["a"], start * 80, buffer)
        return bool((buffer == number).all())

    with SourceReader(infos, max_open=2) as reader, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(600)))
        assert len(reader._open) <= 2 + 8


@pytest.mark.usefixtures("system")
def test_what_is_announced_is_read_as_if_it_had_not_been(path: Path) -> None:
    info = read_header(path)
    buffer = bytearray(400)
    with SourceReader([info]) as reader:
        reader.announce(info.tensors["a"], 100, 300)
        reader.announce(info.tensors["b"], 0, 0)
        reader.read_into(info.tensors["a"], 0, buffer)
    assert buffer == np.arange(100, dtype=np.int32).tobytes()


def test_what_is_wrong_is_told_when_it_is_read(path: Path) -> None:
    info = read_header(path)
    path.unlink()
    with SourceReader([info]) as reader:
        reader.announce(info.tensors["a"], 0, 400)
    assert kind_of(info, info.tensors["a"]) == "source-changed"


def test_buffers_of_any_shape(path: Path) -> None:
    info = read_header(path)
    with SourceReader([info]) as reader:
        matrix = np.zeros((10, 10), dtype=np.int32)
        reader.read_into(info.tensors["a"], 0, matrix)
        assert (matrix.reshape(-1) == np.arange(100)).all()
        reader.read_into(info.tensors["b"], 0, np.zeros((0, 3), dtype=np.float32))


@pytest.mark.parametrize(("start", "size"), [(-1, 4), (0, 401), (400, 1), (401, 0)])
def test_ranges_outside_of_the_tensor(path: Path, start: int, size: int) -> None:
    info = read_header(path)
    with SourceReader([info]) as reader, pytest.raises(ValueError, match="of 400"):
        reader.read_into(info.tensors["a"], start, bytearray(size))


def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real(fd, [views[0][:7]], offset))
    info = read_header(path)
    buffer = bytearray(400)
    with SourceReader([info]) as reader:
        reader.read_into(info.tensors["a"], 0, buffer)
    assert buffer == np.arange(100, dtype=np.int32).tobytes()


def test_a_file_that_was_written_to(path: Path) -> None:
    info = read_header(path)
    os.utime(path, ns=(0, info.mtime_ns + 1))
    assert kind_of(info, info.tensors["a"]) == "source-changed"


def test_a_file_that_is_gone_or_shorter(path: Path) -> None:
    info = read_header(path)
    os.truncate(path, info.size - 1)
    assert kind_of(info, info.tensors["a"]) == "source-changed"
    path.unlink()
    assert kind_of(info, info.tensors["a"]) == "source-changed"


@pytest.mark.usefixtures("system")
def test_a_file_that_shrinks_while_it_is_open(path: Path) -> None:
    info = read_header(path)
    with SourceReader([info]) as reader:
        reader.read_into(info.tensors["a"], 0, bytearray(4))
        os.truncate(path, info.size - 4)
        with pytest.raises(InvalidInput, match="became shorter") as caught:
            reader.read_into(info.tensors["a"], 0, bytearray(400))
    assert caught.value.problems[0].kind == "source-changed"


def test_a_failing_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    info = read_header(path)
    with SourceReader([info]) as reader, pytest.raises(SourceError) as caught:
        reader.read_into(info.tensors["a"], 0, bytearray(4))
    assert caught.value.exit_code == 3
    assert str(caught.value) == f"{path} [a]: cannot be read: Input/output error"


def test_a_closed_reader_and_a_strange_file(path: Path) -> None:
    info = read_header(path)
    reader = SourceReader([])
    with pytest.raises(ValueError, match="not a file of this reader"):
        reader.read_into(info.tensors["a"], 0, bytearray(4))
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read_into(info.tensors["a"], 0, bytearray(4))
