"""Calls on a Ray cluster: one of this machine's own, or one that is there already."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any, Final

from quantrecipe.converter.clusters import (
    RETRIES,
    Call,
    ClusterExecutor,
    ExecutorError,
    knock,
    make,
    needing,
    quiet,
)

# Ray takes 30% of the memory for objects unless told otherwise. This is the least it accepts, and
# no object of ours is larger than a few kilobytes.
_OBJECT_STORE_BYTES: Final = 80 * 2**20

# No reports to Ray's makers; no lines of its daemons on stdout, which may be meant for a program.
# What the user has set stays as it is.
_ENVIRONMENT: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "(?s).*"}


@contextmanager
def open_ray(address: str | None, workers: int) -> Iterator[Executor]:
    """An executor on Ray.

    A program that has connected to a cluster itself keeps its connection, and without an address it
    is used.

    Args:
        address: as ``ray.init`` takes it; ``None`` starts ``workers`` workers on this machine.
        workers: how many to start.

    Raises:
        ExecutorError: Ray is not installed, or the cluster cannot be reached.
    """
    with _environment(_ENVIRONMENT), needing("ray"):
        import ray
    with _environment(_ENVIRONMENT), quiet("ray"):
        if ray.is_initialized() and address is None:
            yield ClusterExecutor(_Ray())
            return
        try:
            # Ray itself would try for minutes.
            if address is not None:
                knock(address)
            with _own_signals():
                _connect(address, workers)
        except (OSError, RuntimeError, ValueError) as error:
            place = f"at {address}" if address else "on this machine"
            raise ExecutorError(f"Ray {place} cannot be used: {error}") from error
        try:
            yield ClusterExecutor(_Ray())
        finally:
            ray.shutdown()


def _connect(address: str | None, workers: int) -> None:
    import ray

    own: dict[str, Any] = {"num_cpus": workers, "object_store_memory": _OBJECT_STORE_BYTES}
    ray.init(
        address=address or "local",
        include_dashboard=None if address else False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        **({} if address else own),
    )


class _Ray:
    def __init__(self) -> None:
        import ray

        self._make = ray.remote(make).options(max_retries=RETRIES)

    def start(self, call: Call) -> Future[Any]:
        future: Future[Any] = self._make.remote(call).future()
        return future

    def slots(self) -> int:
        import ray

        return int(ray.cluster_resources().get("CPU", 0))

    def own_error(self, error: BaseException) -> BaseException:
        from ray.exceptions import RayError, RayTaskError

        if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
            # Ray's own error holds the traceback of the worker as text.
            error.cause.__cause__ = error
            return error.cause
        if isinstance(error, RayError):
            return ExecutorError(f"Ray gave up a call: {error}")
        return error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Give SIGTERM back to whom it belonged: Ray takes it, and would abort on it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Within it, the variables have these values if they had none."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
