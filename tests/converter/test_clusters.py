"""The contract of ``concurrent.futures``, over a scheduler that is a few threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Event, Semaphore

import pytest

from quantrecipe.converter.clusters import Call, ClusterExecutor, ExecutorError, make
from tests.converter.waiting import LIMIT, wait_until

SLOTS = 2


class Wrapped(Exception):  # noqa: N818 - the name says what it is for
    """What this scheduler makes of an exception."""


class Threads:
    """A scheduler that counts what it was given, and wraps what is raised."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(16)
        self.given = 0
        self.broken: Exception | None = None

    def start(self, call: Call) -> Future[object]:
        if self.broken:
            raise self.broken
        self.given += 1
        return self.pool.submit(self._wrapping, call)

    def slots(self) -> int:
        if self.broken:
            raise self.broken
        return SLOTS

    def own_error(self, error: BaseException) -> BaseException:
        return error.__cause__ if isinstance(error, Wrapped) and error.__cause__ else error

    def _wrapping(self, call: Call) -> object:
        try:
            return make(call)
        except ValueError as error:
            raise Wrapped from error


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    threads.pool.shutdown()


@pytest.fixture
def executor(threads: Threads) -> Iterator[ClusterExecutor]:
    with ClusterExecutor(threads) as executor:
        yield executor


@pytest.fixture
def gate(executor: ClusterExecutor) -> Iterator[Event]:
    """Opened before the executor is shut down, which waits for those who wait here."""
    gate = Event()
    yield gate
    gate.set()


@pytest.fixture
def turns(executor: ClusterExecutor) -> Iterator[Semaphore]:
    """Lets one through for each release; and everybody before the executor is shut down."""
    turns = Semaphore(0)
    yield turns
    turns.release(100)


def test_results_belong_to_their_futures(threads: Threads) -> None:
    with ClusterExecutor(threads) as executor:
        assert list(executor.map(divmod, range(40), [7] * 40)) == [divmod(n, 7) for n in range(40)]
        assert executor.submit(dict, a=1).result() == {"a": 1}


def test_exceptions_arrive_unwrapped(threads: Threads) -> None:
    with ClusterExecutor(threads) as executor:
        assert isinstance(executor.submit(int, "x").exception(), ValueError)
        assert isinstance(executor.submit(divmod, 1, 0).exception(), ZeroDivisionError)


def test_a_scheduler_gets_only_what_keeps_it_busy(
    threads: Threads, executor: ClusterExecutor, turns: Semaphore
) -> None:
    futures = [executor.submit(turns.acquire) for _ in range(20)]
    for last in range(SLOTS, 20):
        wait_until(futures[last].running)
        assert not any(future.running() for future in futures[last + 1 :])
        turns.release()
    turns.release(SLOTS)
    assert all(future.result(timeout=LIMIT) for future in futures)
    assert threads.given == 20


def test_what_waits_can_be_cancelled_and_what_runs_cannot(
    threads: Threads, executor: ClusterExecutor, gate: Event
) -> None:
    futures = [executor.submit(gate.wait) for _ in range(10)]
    wait_until(futures[SLOTS].running)
    assert not futures[0].cancel()
    assert futures[8].cancel()
    with pytest.raises(CancelledError):
        futures[8].result()
    gate.set()
    executor.shutdown()
    assert threads.given == 9


@pytest.mark.parametrize("cancel", [True, False])
def test_shutdown_waits_for_what_runs(executor: ClusterExecutor, gate: Event, cancel: bool) -> None:
    futures = [executor.submit(gate.wait) for _ in range(10)]
    wait_until(futures[SLOTS].running)
    executor.shutdown(wait=False, cancel_futures=cancel)
    assert not futures[0].done()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(gate.wait)
    gate.set()
    executor.shutdown(wait=True)
    assert all(future.done() for future in futures)
    assert sum(future.cancelled() for future in futures) == (10 - SLOTS - 1 if cancel else 0)


def test_a_scheduler_that_takes_nothing_says_so_to_each(threads: Threads) -> None:
    threads.broken = OSError("away")
    with ClusterExecutor(threads) as executor:
        errors = [executor.submit(int).exception() for _ in range(3)]
    assert [str(error) for error in errors] == ["away"] * 3


def test_an_error_that_cannot_be_unwrapped_ends_the_call_all_the_same(threads: Threads) -> None:
    def unable(error: BaseException) -> BaseException:
        raise LookupError("what is this?")

    threads.own_error = unable  # type: ignore[method-assign]
    with ClusterExecutor(threads) as executor:
        assert isinstance(executor.submit(divmod, 1, 0).exception(), LookupError)


def test_a_call_that_the_scheduler_drops_is_an_error(threads: Threads) -> None:
    dropped: Future[object] = Future()
    dropped.cancel()
    threads.start = lambda call: dropped  # type: ignore[method-assign]
    with ClusterExecutor(threads) as executor:
        assert isinstance(executor.submit(int).exception(), ExecutorError)
