"""Many tasks on a few threads, with results and errors as if they had run one after the other."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import Event, local
from typing import Final, Generic, TypeVar

Worker = TypeVar("Worker")
Result = TypeVar("Result")

# Tasks that may wait for each worker; more would only hold futures.
_AHEAD: Final = 4


class Stopped(Exception):  # noqa: N818 - nothing went wrong here
    """Raised in a task that is to end because another one failed."""


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers(Generic[Worker]):
    """Threads with a worker object each, made when a thread starts on its first task.

    Args:
        count: threads; 1 runs the tasks in this one.
        make: makes a worker; scratch memory and the like belong to one thread.
    """

    def __init__(self, count: int, make: Callable[[], Worker]) -> None:
        self._count = count
        self._make = make
        self._stop = Event()
        self._local = local()

    def check(self) -> None:
        """To be called by tasks now and then.

        Raises:
            Stopped: another task failed, or the caller has left.
        """
        if self._stop.is_set():
            raise Stopped

    def run(self, tasks: Iterable[Callable[[Worker], Result]]) -> Iterator[Result]:
        """Results in the order of ``tasks``; the error raised is that of the first that fails."""
        if self._count == 1:
            worker = self._make()
            for task in tasks:
                yield task(worker)
            return
        with ThreadPoolExecutor(self._count, thread_name_prefix="quantrecipe") as pool:
            remaining = iter(tasks)
            waiting: deque[Future[Result]] = deque()
            try:
                while True:
                    room = self._count * _AHEAD - len(waiting)
                    waiting += (pool.submit(self._call, task) for task in islice(remaining, room))
                    if not waiting:
                        return
                    yield waiting.popleft().result()
            finally:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _call(self, task: Callable[[Worker], Result]) -> Result:
        self.check()
        worker = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = self._make()
        return task(worker)
