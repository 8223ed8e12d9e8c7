"""Where the work is done: threads here, or the workers of a Ray or a Dask cluster.

An executor is chosen by a short text: ``threads``; ``ray`` or ``dask`` for a cluster of this
machine's own that lasts as long as the conversion; ``ray:ADDRESS`` or ``dask:ADDRESS`` for one that
is there already. Reading that text imports neither of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Final, Literal, TypeVar, get_args

from quantrecipe.converter.clusters import ExecutorError
from quantrecipe.converter.workers import available_cores
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean

Argument = TypeVar("Argument")
Result = TypeVar("Result")

Kind = Literal["threads", "ray", "dask"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

# Calls handed to an executor and not done; more would only hold futures.
_OUTSTANDING: Final = 256

_HOST_AND_PORT: Final = r"[^\s/]+:[0-9]{1,5}"
_ADDRESSES: Final[Mapping[Kind, re.Pattern[str]]] = MappingProxyType(
    {
        "ray": re.compile(rf"auto|(ray://)?{_HOST_AND_PORT}"),
        "dask": re.compile(rf"((tcp|tls|ws|wss|ucx)://)?{_HOST_AND_PORT}"),
    }
)


@dataclass(frozen=True, slots=True)
class ExecutorSpec:
    """An executor, chosen but not started.

    Attributes:
        kind: who runs the tasks.
        address: of a cluster that is there already, in the words of its kind; ``None`` for workers
            of this machine's own.
    """

    kind: Kind
    address: str | None = None


def parse_executor(spec: str) -> ExecutorSpec:
    """What ``threads``, ``ray``, ``ray:ADDRESS``, ``dask`` or ``dask:ADDRESS`` stands for.

    Raises:
        InvalidInput: it is none of these; the kind of the problem is ``unknown-executor`` or
            ``bad-address``.
    """
    word, colon, address = spec.partition(":")
    for kind in KINDS:
        if word == kind:
            _check_address(kind, colon, address)
            return ExecutorSpec(kind, address or None)
    message = f"there is no executor {word!r}"
    raise InvalidInput(Problem("unknown-executor", message, did_you_mean(word, KINDS)))


def _check_address(kind: Kind, colon: str, address: str) -> None:
    if not colon:
        return
    if kind == "threads":
        message, hint = "threads have no address", "Write threads; --jobs says how many."
    elif not _ADDRESSES[kind].fullmatch(address):
        message = f"{address!r} is no address of a cluster"
        hint = f"Write {kind}:HOST:PORT, or {kind} alone for workers of this machine's own."
    else:
        return
    raise InvalidInput(Problem("bad-address", message, hint))


@contextmanager
def open_executor(spec: str | ExecutorSpec, jobs: int | None = None) -> Iterator[Executor]:
    """An executor that lasts as long as the context.

    On leaving, what waits is cancelled and what runs is waited for, so that nobody writes any
    more; then a cluster that was started here is shut down, and one that was there is left.

    Functions to submit must be importable by name wherever the workers are, arguments small.
    A function whose worker dies is called again elsewhere, up to three times, so it must be
    idempotent; one that raises is not, and its exception arrives as itself.

    Args:
        spec: as in ``parse_executor``.
        jobs: workers to start, one for each core if left out. A cluster that is there already
            has as many as it has.

    Raises:
        InvalidInput: ``spec`` is no executor.
        ExecutorError: what it needs is not installed, or the cluster cannot be reached.
    """
    chosen = parse_executor(spec) if isinstance(spec, str) else spec
    count = jobs or available_cores()
    match chosen.kind:
        case "threads":
            pool: Executor = ThreadPoolExecutor(count, thread_name_prefix="quantrecipe")
            with _closing(pool):
                yield pool
        case "ray":
            from quantrecipe.converter.on_ray import open_ray

            with open_ray(chosen.address, count) as pool, _closing(pool):
                yield pool
        case "dask":
            from quantrecipe.converter.on_dask import open_dask

            with open_dask(chosen.address, count) as pool, _closing(pool):
                yield pool


def call_each(
    executor: Executor, function: Callable[[Argument], Result], arguments: Iterable[Argument]
) -> Iterator[Result]:
    """Call a function with each argument; results as they come.

    On leaving, what waits is cancelled.

    Raises:
        ExecutorError: a worker died, and its work was not done again.
    """
    remaining = iter(arguments)
    waiting: set[Future[Result]] = set()
    try:
        while True:
            for argument in islice(remaining, _OUTSTANDING - len(waiting)):
                waiting.add(executor.submit(function, argument))
            if not waiting:
                return
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            failed = [future for future in finished if future.exception() is not None]
            for future in finished.difference(failed):
                yield future.result()
            for future in failed:
                future.result()
    except BrokenExecutor as error:
        what = f"a worker died, and its work was not done again: {error}"
        raise ExecutorError(what) from error
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def _closing(pool: Executor) -> Iterator[None]:
    try:
        yield
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
