"""All units of a plan, by threads here or by an executor, written down as they are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from threading import Lock
from typing import Final

from quantrecipe.checkpoint import Journal, OutputFiles, SourceReader, Staging
from quantrecipe.converter.devices import CPU
from quantrecipe.converter.digesting import OutputDigests, SourceDigests
from quantrecipe.converter.executors import call_each
from quantrecipe.converter.factors import Factors
from quantrecipe.converter.keeping import Done, Keeper
from quantrecipe.converter.protocol import DEFAULT_BLOCK_BYTES, Progress, silent
from quantrecipe.converter.resuming import JOURNAL_NAME, Earlier
from quantrecipe.converter.units import Unit
from quantrecipe.converter.workers import Workers, available_cores
from quantrecipe.converter.working import (
    Setup,
    UnitResult,
    UnitWorker,
    assign,
    one_thread,
    perform,
)
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import OutputFile
from quantrecipe.schema.plan import Plan

# What the disk is asked to read before it is needed, beyond a unit for each worker.
_UNITS_AHEAD: Final = 6

# A GPU needs more work at a time to be worth its launches; a unit is not much larger.
_GPU_BLOCK_BYTES: Final = 128 << 20
_THREADS_PER_GPU: Final = 4


@dataclass(frozen=True, slots=True)
class Means:
    """What a conversion is carried out with. None of it changes a byte of the output.

    Attributes:
        block_bytes: about how many bytes of numbers a worker holds at a time; ``None``: what suits
            the devices.
        jobs: threads to work with; ``None``: as many as there are cores.
        devices: where to compute, as torch calls it; workers are shared out among them.
        executor: whoever runs the work in place of threads: processes, perhaps on other machines,
            that see source and output under the same paths.
        progress: told of source bytes that are done with.
    """

    block_bytes: int | None = None
    jobs: int | None = None
    devices: tuple[str, ...] = (CPU,)
    executor: Executor | None = None
    progress: Progress = silent

    def __post_init__(self) -> None:
        if self.block_bytes is not None and self.block_bytes < 1:
            raise ValueError(
                f"block_bytes is {self.block_bytes}, but at least one byte must be held"
            )
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"{self.jobs} jobs do no work")

    @property
    def workers(self) -> int:
        """How many threads work."""
        if self.jobs is not None:
            return self.jobs
        cores, gpus = available_cores(), sum(device != CPU for device in self.devices)
        # A few threads keep a GPU busy; more would be in each other's way.
        return min(cores, _THREADS_PER_GPU * gpus) if gpus else cores

    @property
    def numbers_at_a_time(self) -> int:
        """Bytes of numbers that a worker holds at a time."""
        if self.block_bytes is not None:
            return self.block_bytes
        return DEFAULT_BLOCK_BYTES if set(self.devices) == {CPU} else _GPU_BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Worked:
    """What was written.

    Attributes:
        units: a result for each unit of the plan, in their order.
        outputs: the files.
        tensors: digests of tensors, by file and name.
        sources: SHA-256 of the source's files, by path; ``None`` where nobody knows it.
    """

    units: tuple[UnitResult, ...]
    outputs: tuple[OutputFile, ...]
    tensors: Mapping[tuple[str, str], str]
    sources: Mapping[Location, str | None]


def work(
    plan: Plan,
    units: Sequence[Unit],
    setup: Setup,
    factors: Factors,
    staging: Staging,
    earlier: Earlier,
    means: Means,
) -> Worked:
    """Carry out what an earlier attempt left to do, and hash all of it.

    Args:
        plan: what to do; its files are laid out.
        units: all units of it.
        setup: what the workers are told.
        factors: of all modules that are smoothed.
        staging: where.
        earlier: what is done already, and still there.
        means: how.

    Raises:
        InvalidInput: the source's numbers cannot be converted, or it has changed.
        OutputError: the output could not be written.
    """
    results = dict(earlier.units)
    with ExitStack() as stack:
        output = stack.enter_context(OutputFiles(staging.folder))
        journal = stack.enter_context(closing(Journal(staging.root / JOURNAL_NAME)))
        keeper = stack.enter_context(closing(Keeper(journal, output)))
        sources = stack.enter_context(
            SourceDigests(
                plan.source_files,
                earlier.sources,
                lambda path, found: keeper.add(Done({"source": path, "sha256": found})),
            )
        )
        outputs = stack.enter_context(OutputDigests(plan, units, staging.folder, means.workers))
        for result in results.values():
            outputs.done(result)
            means.progress(units[result.index].source_bytes, units[result.index].of.name)
        left = [unit for unit in units if unit.index not in results]
        run = _run_elsewhere if means.executor is not None else _run_here
        for result in run(setup, left, factors, output, means):
            unit = units[result.index]
            results[result.index] = result
            whole = outputs.done(result)
            keeper.add(_done(result, unit, whole, synced=means.executor is not None))
            sources.check()
            staging.keep = True
        files, tensors = outputs.results()
        return Worked(
            tuple(results[unit.index] for unit in units), files, tensors, sources.results()
        )


def _done(result: UnitResult, unit: Unit, whole: frozenset[str], *, synced: bool) -> Done:
    ranges = unit.ranges().values()
    files = frozenset() if synced else frozenset(part.file for part in ranges)
    return Done(result.as_record(), files, sum(part.nbytes for part in ranges), whole)


def _run_here(
    setup: Setup, units: Sequence[Unit], factors: Factors, output: OutputFiles, means: Means
) -> Iterator[UnitResult]:
    """On threads of this process."""
    devices, telling = cycle(means.devices), Lock()

    def progress(count: int, name: str) -> None:
        workers.check()
        with telling:
            means.progress(count, name)

    workers: Workers[UnitWorker] = Workers(
        means.workers, lambda: UnitWorker(setup, reader, output, factors, next(devices))
    )
    with one_thread(), SourceReader(setup.files, check=workers.check) as reader:
        reader.expect(source for unit in units for source in unit.sources())
        distance = means.workers + _UNITS_AHEAD
        ahead = [*units[distance:], *(None for _ in units[:distance])]
        tasks: list[Callable[[UnitWorker], UnitResult]] = [
            partial(UnitWorker.perform, unit=unit, progress=progress, following=following)
            for unit, following in zip(units, ahead, strict=True)
        ]
        yield from workers.run(tasks)


def _run_elsewhere(
    setup: Setup, units: Sequence[Unit], factors: Factors, output: OutputFiles, means: Means
) -> Iterator[UnitResult]:
    """By an executor; results as they come."""
    assert means.executor is not None
    names = {unit.index: unit for unit in units}
    assignments = assign(setup, units, factors, means.devices)
    for results in call_each(means.executor, perform, assignments):
        for result in results:
            unit = names[result.index]
            means.progress(unit.source_bytes, unit.of.name)
            yield result
