"""Calls on a Dask cluster: one of this machine's own, or one that is there already."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quantrecipe.converter.clusters import (
    Call,
    ClusterExecutor,
    ExecutorError,
    knock,
    make,
    needing,
    quiet,
)

if TYPE_CHECKING:
    from distributed import Client


@contextmanager
def open_dask(address: str | None, workers: int) -> Iterator[Executor]:
    """An executor on Dask.

    Args:
        address: of a scheduler; ``None`` starts ``workers`` workers on this machine.
        workers: how many to start.

    Raises:
        ExecutorError: Dask is not installed, or the scheduler cannot be reached.
    """
    with needing("dask"):
        from distributed import Client
    with quiet("distributed"):
        if address is None:
            with _cluster(workers) as cluster, Client(cluster, set_as_default=False) as client:
                yield ClusterExecutor(_Dask(client))
            return
        try:
            knock(address)
            client = Client(address, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ExecutorError(f"Dask at {address} cannot be used: {error}") from error
        with client:
            yield ClusterExecutor(_Dask(client))


@contextmanager
def _cluster(workers: int) -> Iterator[Any]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        # Memory is bounded by the size of the blocks; pages of files must not get a worker killed.
        memory_limit=None,
        host="127.0.0.1",
        # There is no dashboard, but there is a server for it, and its usual port may be taken.
        dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": False},
        silence_logs=logging.CRITICAL,
    ) as cluster:
        yield cluster


class _Dask:
    """Dask makes calls again whose worker died, three times unless the scheduler is told otherwise.

    Its ``retries`` are for calls that raise, so there are none here.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        # Two equal calls are two calls, not one with two futures.
        self._executor = client.get_executor(pure=False)

    def start(self, call: Call) -> Future[Any]:
        future: Future[Any] = self._executor.submit(make, call)
        return future

    def slots(self) -> int:
        return sum(self._client.nthreads().values())

    def own_error(self, error: BaseException) -> BaseException:
        from distributed import KilledWorker

        if isinstance(error, KilledWorker):
            return ExecutorError(f"Dask gave up a call: {error}")
        return error
