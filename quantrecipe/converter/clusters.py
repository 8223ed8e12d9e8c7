"""What the executors on clusters share: the contract of ``concurrent.futures``, kept on this side.

Schedulers differ in what cancelling means: Ray interrupts a task that runs, Dask lets it run on
unseen. So tasks wait here, and a scheduler gets only as many as keep its workers busy. What waits
can be cancelled for certain; what was handed over runs, cannot be cancelled, and is waited for by
``shutdown``.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Condition, Thread
from typing import Any, Final, ParamSpec, Protocol, TypeVar

from quantrecipe.schema.problems import QuantrecipeError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

RETRIES: Final = 3
"""How often a call is made again, elsewhere, because the worker that had it died."""

# Calls handed over beyond those that can run, so that no worker waits for the next.
_AHEAD: Final = 1

_KNOCK_SECONDS: Final = 10


class ExecutorError(QuantrecipeError):
    """A cluster cannot be used: not installed, not reachable, or its workers keep dying."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call to be made on a worker."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    keywords: Mapping[str, Any]


def make(call: Call) -> Any:
    """Make the call, on a worker."""
    return call.function(*call.args, **call.keywords)


class Cluster(Protocol):
    """A scheduler of other processes."""

    def start(self, call: Call) -> Future[Any]:
        """Hand a call over; it is made again if its worker dies, and not if it raises."""

    def slots(self) -> int:
        """How many calls can run at a time, as of now."""

    def own_error(self, error: BaseException) -> BaseException:
        """What a call raised, without the scheduler's wrapping."""


class ClusterExecutor(Executor):
    """An executor over the workers of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._changed = Condition()
        self._waiting: deque[tuple[Future[Any], Call]] = deque()
        self._running: set[Future[Any]] = set()
        self._closed = False
        self._thread = Thread(target=self._hand_over, name="quantrecipe-cluster", daemon=True)
        self._thread.start()

    def submit(
        self,
        fn: Callable[Arguments, Result],
        /,
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Future[Result]:
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._waiting.append((future, Call(fn, args, kwargs)))
            self._changed.notify_all()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        dropped: list[Future[Any]] = []
        with self._changed:
            self._closed = True
            if cancel_futures:
                dropped = [future for future, _ in self._waiting]
                self._waiting.clear()
            self._changed.notify_all()
        for future in dropped:
            future.cancel()
            future.set_running_or_notify_cancel()
        if wait:
            self._thread.join()

    def _hand_over(self) -> None:
        while (task := self._next(self._limit())) is not None:
            future, call = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                started = self._cluster.start(call)
            except Exception as error:  # noqa: BLE001 - it goes to whoever holds the future
                future.set_exception(self._cluster.own_error(error))
                continue
            with self._changed:
                self._running.add(started)
            started.add_done_callback(partial(self._done, future))

    def _limit(self) -> int:
        try:
            slots = self._cluster.slots()
        except Exception:  # noqa: BLE001 - the call that is started next says it to its holder
            slots = 1
        return max(slots, 1) + _AHEAD

    def _next(self, limit: int) -> tuple[Future[Any], Call] | None:
        """The next call, once there is room for it; ``None`` when all is done."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    (self._waiting and len(self._running) < limit)
                    or (self._closed and not self._waiting and not self._running)
                )
            )
            return self._waiting.popleft() if self._waiting else None

    def _done(self, future: Future[Any], started: Future[Any]) -> None:
        try:
            if started.cancelled():
                future.set_exception(ExecutorError("the cluster gave up a call"))
            elif (error := started.exception()) is not None:
                future.set_exception(self._cluster.own_error(error))
            else:
                future.set_result(started.result())
        except Exception as error:  # noqa: BLE001 - a future without an end would be waited for
            future.set_exception(error)
        finally:
            with self._changed:
                self._running.discard(started)
                self._changed.notify_all()


def knock(address: str) -> None:
    """Find out quickly whether anybody listens at ``HOST:PORT`` or ``SCHEME://HOST:PORT``.

    Raises:
        OSError: nobody does, or there is no such host.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Within it, a module that is not installed is an error that names the extra it comes with.

    Raises:
        ExecutorError: in the place of ``ModuleNotFoundError``.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ExecutorError(
            f"the executor {extra!r} cannot be used: {error.name} is not installed\n"
            f"  pip install 'quantrecipe[{extra}]'"
        ) from error


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Within it, a library's logger and its handlers pass on nothing but what is fatal."""
    top = logging.getLogger(logger)
    holders: list[logging.Logger | logging.Handler] = [top, *top.handlers]
    levels = [holder.level for holder in holders]
    try:
        for holder in holders:
            holder.setLevel(logging.CRITICAL)
        yield
    finally:
        for holder, level in zip(holders, levels, strict=True):
            holder.setLevel(level)
