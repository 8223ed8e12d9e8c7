"""Conversions by other processes: the same bytes, also when a worker dies in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from quantrecipe.converter import Means, carry_out, convert, plan, working
from quantrecipe.converter.clusters import ExecutorError
from quantrecipe.schema.problems import InvalidInput, OutputError
from tests.converter.dying import Dying
from tests.converter.making import parsed, recipe, result_of, save, save_statistics, weight_spec
from tests.converter.smoothed_model import CHANNELS, Model
from tests.converter.test_streaming import grid_of_everything


@pytest.fixture(autouse=True)
def small_assignments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working, "ASSIGNMENT_BYTES", 3000)


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def source(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"m{index}.weight": torch.randn(20, 64, generator=generator).bfloat16()
        for index in range(8)
    }
    tensors |= {"norm.weight": torch.ones(8), "m1.bias": torch.ones(20)}
    return save(tmp_path / "source" / "m.safetensors", tensors).parent


def check(source: Path, folder: Path, executor: Executor, made: Any) -> None:
    expected = result_of(convert(made, source, folder / "here").out)
    told: list[int] = []
    done = convert(
        made,
        source,
        folder / "elsewhere",
        executor=executor,
        progress=lambda count, name: told.append(count),
    )
    assert result_of(done.out) == expected
    assert sum(told) == done.source_bytes
    assert not (folder / "elsewhere.partial").exists()


def test_threads_of_somebody_else(tmp_path: Path, source: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        check(source, tmp_path, pool, parsed(recipe()))


def test_processes(tmp_path: Path, processes: Executor) -> None:
    source, document = grid_of_everything(tmp_path, (4, 8))
    check(source, tmp_path, processes, parsed(document))


def test_a_cluster(tmp_path: Path, cluster: Executor) -> None:
    source, document = grid_of_everything(tmp_path, (4, 8))
    check(source, tmp_path, cluster, parsed(document))


def test_smoothing_elsewhere(tmp_path: Path, source: Path, processes: Executor) -> None:
    maxima = {f"m{index}": torch.rand(2, 64) for index in range(8)}
    save_statistics(tmp_path / "s.safetensors", "model", maxima)
    smoothing = {"kind": "smoothquant", "alpha": 0.5, "apply": "online"}
    scheme = {
        "weight": weight_spec("int8"),
        "smoothing": {**smoothing, "statistics": "s.safetensors"},
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(target="transformerlab", schemes={"all": scheme})))
    check(source, tmp_path, processes, path)


def test_choosing_alpha_elsewhere(tmp_path: Path, processes: Executor) -> None:
    model = Model(tmp_path, 4, {"0.w1": ("bfloat16", 9), "0.w3": ("float32", 7)})
    model.keep_tokens({"0.w1": torch.randn(4, CHANNELS)})
    path = model.recipe(weight_spec("int8"), {"search": [0.2, 0.8]}, siblings=[["*.w1", "*.w3"]])
    check(model.source, tmp_path, processes, path)


def test_a_worker_that_dies_in_the_middle_is_replaced(
    tmp_path: Path, source: Path, cluster: Executor
) -> None:
    expected = result_of(convert(parsed(recipe()), source, tmp_path / "here").out)
    planned = plan(parsed(recipe()), source)
    done = carry_out(planned, Dying(), tmp_path / "out", Means(executor=cluster))
    assert (source / "died").exists()
    assert result_of(done.out) == expected


def test_where_it_is_not_replaced_the_same_command_goes_on(tmp_path: Path, source: Path) -> None:
    expected = result_of(convert(parsed(recipe()), source, tmp_path / "here").out)
    planned, told = plan(parsed(recipe()), source), list[str]()
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(ExecutorError, match="a worker died"),
    ):
        carry_out(planned, Dying(), tmp_path / "out", Means(executor=pool))
    assert not (tmp_path / "out").exists()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        means = Means(executor=pool)
        done = carry_out(planned, Dying(), tmp_path / "out", means, notice=told.append)
    assert told[0].startswith("going on: ")
    assert result_of(done.out) == expected


def test_numbers_that_are_refused_elsewhere_are_named(tmp_path: Path, processes: Executor) -> None:
    weight = torch.ones(6, 8)
    weight[4, 3] = float("inf")
    tensors = {f"m{index}.weight": torch.ones(30, 30) for index in range(6)}
    source = save(tmp_path / "m.safetensors", tensors | {"m9.weight": weight})
    with pytest.raises(InvalidInput, match=r"m9.weight.*infinity .* at index \[4, 3\]"):
        convert(parsed(recipe()), source, tmp_path / "out", executor=processes)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_another_version_elsewhere_is_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            future: Future[Any] = Future()
            with monkeypatch.context() as patch:
                patch.setattr(working, "__version__", "0.0.9")
                try:
                    future.set_result(fn(*args, **kwargs))
                except OutputError as error:
                    future.set_exception(error)
            return future

    with pytest.raises(OutputError, match=r"has quantrecipe 0\.0\.9, and .* made"):
        convert(parsed(recipe()), source, tmp_path / "out", executor=Elsewhere())


def test_a_worker_that_outlived_an_attempt_cannot_spoil_the_next(
    tmp_path: Path, source: Path
) -> None:
    """It would write what another recipe asked for, at another plan's offsets."""
    kept: list[Any] = []

    class Late(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            kept.append((fn, args))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(parsed(recipe()), source, tmp_path / "out", executor=Late())
    other = parsed(recipe(weight_spec("int8", "channel", "bfloat16")))
    spoiled: list[str] = []

    def meanwhile(count: int, name: str) -> None:
        fn, args = kept[0]
        try:
            fn(*args)
        except OutputError as error:
            spoiled.append(str(error))

    done = convert(other, source, tmp_path / "out", progress=meanwhile, jobs=1)
    assert "No such file" in spoiled[0]
    assert result_of(done.out) == result_of(convert(other, source, tmp_path / "fresh").out)


@pytest.mark.xdist_group("cluster-dask")
def test_the_command_with_a_cluster_of_its_own(tmp_path: Path, source: Path) -> None:
    pytest.importorskip("distributed")
    expected = result_of(convert(parsed(recipe()), source, tmp_path / "here").out)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe()))
    code = "from quantrecipe.cli.convert import main; main()"
    places = ["--recipe", str(path), str(source), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *places, "--executor", "dask", "--jobs", "2", "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert json.loads(done.stdout)["out"] == str(tmp_path / "out")
    assert result_of(tmp_path / "out") == expected
