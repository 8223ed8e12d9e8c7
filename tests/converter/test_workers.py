"""Tasks on threads: order, errors, and leaving early."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.converter.workers import Stopped, Workers, available_cores
from tests.converter.waiting import LIMIT


@given(count=st.integers(1, 4), tasks=st.integers(0, 40))
def test_results_come_in_the_order_of_tasks(count: int, tasks: int) -> None:
    made: list[Callable[[object], int]] = [
        lambda worker, number=number: number  # type: ignore[misc]
        for number in range(tasks)
    ]
    assert list(Workers(count, object).run(made)) == list(range(tasks))


@pytest.mark.parametrize("count", [1, 3])
def test_a_worker_belongs_to_one_thread(count: int) -> None:
    def task(worker: list[int]) -> int:
        worker.append(threading.get_ident())
        return id(worker)

    owners: list[list[int]] = []

    def make() -> list[int]:
        owners.append([])
        return owners[-1]

    assert len(list(Workers(count, make).run([task] * 30))) == 30
    assert 1 <= len(owners) <= count
    assert all(len(set(threads)) == 1 for threads in owners)


@pytest.mark.parametrize("count", [1, 4])
def test_the_error_is_that_of_the_first_task_that_fails(count: int) -> None:
    failed = threading.Event()

    def slow(worker: object) -> None:
        assert count == 1 or failed.wait(LIMIT)
        raise ValueError("first")

    def fast(worker: object) -> None:
        failed.set()
        raise ValueError("second")

    with pytest.raises(ValueError, match="first"):
        list(Workers(count, object).run([slow, fast, fast, fast]))


def test_tasks_that_run_are_stopped_when_another_fails() -> None:
    stopped, running = threading.Event(), threading.Event()

    def patient(worker: object) -> None:
        running.set()
        try:
            while True:
                workers.check()
        except Stopped:
            stopped.set()
            raise

    def failing(worker: object) -> None:
        running.wait()
        raise ValueError("no")

    workers: Workers[object] = Workers(2, object)
    with pytest.raises(ValueError, match="no"):
        list(workers.run([failing, patient]))
    assert stopped.is_set()


def test_there_is_a_core() -> None:
    assert available_cores() >= 1
