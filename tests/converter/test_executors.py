"""Executors by name, and small real clusters of Ray and Dask."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor, as_completed
from pathlib import Path

import pytest

from quantrecipe.checkpoint.errors import SourceError
from quantrecipe.converter.clusters import ExecutorError
from quantrecipe.converter.executors import (
    ExecutorSpec,
    open_executor,
    parse_executor,
)
from quantrecipe.schema.problems import InvalidInput
from tests.converter import errands
from tests.converter.conftest import CLUSTERS, MODULES
from tests.converter.waiting import LIMIT, wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("threads", ExecutorSpec("threads")),
        ("ray", ExecutorSpec("ray")),
        ("ray:auto", ExecutorSpec("ray", "auto")),
        ("ray:10.0.0.7:6379", ExecutorSpec("ray", "10.0.0.7:6379")),
        ("ray:ray://head:10001", ExecutorSpec("ray", "ray://head:10001")),
        ("dask", ExecutorSpec("dask")),
        ("dask:head:8786", ExecutorSpec("dask", "head:8786")),
        ("dask:tls://[::1]:8786", ExecutorSpec("dask", "tls://[::1]:8786")),
    ],
)
def test_executors_are_named(text: str, spec: ExecutorSpec) -> None:
    assert parse_executor(text) == spec


@pytest.mark.parametrize(
    ("text", "kind", "hint"),
    [
        ("", "unknown-executor", "Known: dask, ray, threads."),
        ("rya", "unknown-executor", "Did you mean 'ray'?"),
        ("Dask:head:8786", "unknown-executor", "Did you mean 'dask'?"),
        ("slurm", "unknown-executor", "Known: dask, ray, threads."),
        ("threads:4", "bad-address", "--jobs"),
        ("ray:", "bad-address", "ray:HOST:PORT"),
        ("ray: head:1", "bad-address", "ray:HOST:PORT"),
        ("dask:head", "bad-address", "dask:HOST:PORT"),
        ("dask:http://head:8786", "bad-address", "dask:HOST:PORT"),
    ],
)
def test_other_names_are_refused(text: str, kind: str, hint: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_executor(text)
    (problem,) = caught.value.problems
    assert problem.kind == kind
    assert problem.hint is not None
    assert hint in problem.hint


def test_threads_need_no_cluster() -> None:
    with open_executor("threads", jobs=3) as executor:
        assert list(executor.map(errands.add, range(9))) == list(range(1, 10))


@pytest.mark.parametrize(("kind", "module"), MODULES.items())
def test_a_missing_extra_is_named(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExecutorError, match=rf"quantrecipe\[{kind}\]"), open_executor(kind):
        pass


@pytest.mark.parametrize("kind", MODULES)
def test_nobody_at_the_address(kind: str) -> None:
    pytest.importorskip(MODULES[kind])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ExecutorError, match=address), open_executor(f"{kind}:{address}"):
            pass


def test_results_belong_to_their_futures(cluster: Executor) -> None:
    assert list(cluster.map(errands.add, range(30), range(30))) == list(range(0, 60, 2))
    futures = {cluster.submit(errands.add, number, second=5): number for number in range(10)}
    assert {futures[future]: future.result() for future in as_completed(futures)} == {
        number: number + 5 for number in range(10)
    }


def test_equal_calls_are_two_calls(cluster: Executor, tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    for future in [cluster.submit(errands.note, mark) for _ in range(4)]:
        future.result()
    assert len(Path(mark).read_text().split()) == 4


def test_workers_are_other_processes_with_one_thread(cluster: Executor) -> None:
    assert cluster.submit(errands.note).result() != os.getpid()
    assert cluster.submit(errands.environment).result()["OMP_NUM_THREADS"] == "1"


def test_an_exception_arrives_as_itself_and_once(cluster: Executor, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(InvalidInput) as caught:
        cluster.submit(errands.refuse, str(mark)).result()
    assert type(caught.value) is InvalidInput
    assert caught.value.problems == (errands.PROBLEM,)
    assert len(mark.read_text().split()) == 1


@pytest.mark.parametrize(
    ("errand", "kind"), [(errands.fail_to_read, SourceError), (errands.run_full, OSError)]
)
def test_exceptions_keep_what_they_hold(
    cluster: Executor, errand: Callable[[], None], kind: type[Exception]
) -> None:
    with pytest.raises(kind) as expected:
        errand()
    arrived = cluster.submit(errand).exception()
    assert type(arrived) is type(expected.value)
    assert str(arrived) == str(expected.value)
    assert arrived.__dict__ == expected.value.__dict__


def test_a_call_outlives_its_worker(cluster: Executor, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    others = [cluster.submit(errands.add, number) for number in range(4)]
    future = cluster.submit(errands.rest_once, str(mark))
    wait_until(mark.exists)
    wait_until(lambda: mark.read_text().endswith("\n"))
    os.kill(int(mark.read_text()), signal.SIGKILL)
    first, second = future.result(timeout=LIMIT)
    assert first != second
    assert [other.result(timeout=LIMIT) for other in others] == [1, 2, 3, 4]


def test_a_call_that_kills_every_worker_is_given_up(cluster: Executor) -> None:
    error = cluster.submit(errands.die).exception(timeout=LIMIT)
    assert isinstance(error, ExecutorError)
    assert cluster.submit(errands.add, 1).result(timeout=LIMIT) == 2


def check_cancelling(executor: Executor, folder: Path) -> None:
    """Nothing ends before the gate is there, and fewer can begin than there are."""
    gate, marks = folder / "gate", [folder / str(number) for number in range(8)]
    try:
        futures = [executor.submit(errands.note_and_wait, str(mark), str(gate)) for mark in marks]
        wait_until(marks[0].exists)
        assert not futures[0].cancel()
        assert futures[7].cancel()
    finally:
        gate.touch()
    assert all(future.result(timeout=LIMIT) for future in futures[:7])
    assert [mark.exists() for mark in marks] == [True] * 7 + [False]


def test_what_waits_can_be_cancelled(cluster: Executor, tmp_path: Path) -> None:
    check_cancelling(cluster, tmp_path)


def test_what_waits_for_a_thread_can_be_cancelled(tmp_path: Path) -> None:
    with open_executor("threads", jobs=2) as executor:
        check_cancelling(executor, tmp_path)


PROGRAM = """
import json, sys
from quantrecipe.converter.executors import open_executor
from tests.converter import errands
from tests.converter.conftest import CLUSTERS, MODULES

if __name__ == "__main__":
    with open_executor(sys.argv[1], jobs=2) as executor:
        pids = list(executor.map(errands.note, [""] * 6))
        refused = type(executor.submit(errands.fail_to_read).exception()).__name__
        import psutil
        children = [process.pid for process in psutil.Process().children(recursive=True)]
    print(json.dumps([pids, children, refused]))
"""


def run_program(spec: str, folder: Path) -> tuple[set[int], set[int]]:
    """The workers and the children of a program with this executor, which says nothing else."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program), spec],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    workers, children, refused = json.loads(done.stdout)
    assert refused == "SourceError"
    return set(workers), set(children)


@pytest.mark.parametrize("kind", CLUSTERS)
def test_a_cluster_of_our_own_is_quiet_and_leaves_nobody(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    pytest.importorskip(MODULES[kind])
    workers, children = run_program(kind, tmp_path)
    assert workers <= children
    wait_until(lambda: not any(alive(pid) for pid in children))


@pytest.mark.xdist_group("cluster-ray")
@pytest.mark.parametrize("cluster", ["ray"], indirect=True)
def test_a_ray_cluster_that_was_there_stays(cluster: Executor, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    address = ray.get_runtime_context().gcs_address
    workers, children = run_program(f"ray:{address}", tmp_path)
    assert not workers & children
    assert cluster.submit(errands.add, 1).result() == 2


@pytest.mark.xdist_group("cluster-dask")
def test_a_dask_cluster_that_was_there_stays() -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as there:
        for _ in range(2):
            with open_executor(f"dask:{there.scheduler_address}") as executor:
                assert executor.submit(errands.add, 1).result() == 2


def alive(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
