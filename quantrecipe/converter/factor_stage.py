"""Computing smoothing factors: once for each group of siblings, before anything is quantized.

First the column maxima of every smoothed weight, unit by unit; a maximum does not depend on the
order in which it is taken. Then the factors of each group, and where a recipe leaves alpha to be
chosen, the error of each candidate, module by module. The same threads, executor and devices work
as for the conversion itself. A group that is done is noted in a journal, and is not done again by
an attempt that goes on from there.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from quantrecipe.checkpoint import Journal, SourceReader, read_journal
from quantrecipe.converter.calibration import open_statistics
from quantrecipe.converter.devices import Device
from quantrecipe.converter.engine import Means
from quantrecipe.converter.executors import call_each
from quantrecipe.converter.factors import Factors, GroupFactors
from quantrecipe.converter.measured import column_importance, input_absmax, input_tokens
from quantrecipe.converter.products import ProductErrors
from quantrecipe.converter.refusals import naming
from quantrecipe.converter.smoothing import smoothquant_factors
from quantrecipe.converter.source_rows import SourceRows
from quantrecipe.converter.units import Unit, row_blocks, rows_together, sources_of
from quantrecipe.converter.workers import Workers
from quantrecipe.converter.working import Setup, check_version, in_runs, one_thread
from quantrecipe.formats.transform import block_transform
from quantrecipe.schema.plan import Plan, PlannedModule, SmoothingGroup
from quantrecipe.schema.schemes import PlainWeight
from quantrecipe.schema.tensors import TensorInfo

FACTORS_NAME: Final = "factors"
"""The journal of the groups that are done, beside that of the units."""

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Search:
    """A module, and the factors that are to be compared on it: float32 ``[candidates, in]``."""

    group: int
    module: PlannedModule
    tokens_of: tuple[PlannedModule, ...]
    candidates: Tensor


class FactorWorker:
    """Measures weights, for one thread.

    Args:
        setup: as for units.
        reader: the source.
        device: where to compute.
    """

    def __init__(self, setup: Setup, reader: SourceReader, device: str) -> None:
        self._setup = setup
        self._reader = reader
        self._device = Device(device)

    def column_absmax(self, unit: Unit) -> Tensor:
        """The largest magnitude in each column of a unit's rows, float32 ``[in]``, on the CPU.

        Raises:
            InvalidInput: a number of the weight is not finite.
        """
        module = unit.of
        assert isinstance(module, PlannedModule)
        assert not isinstance(module.weight, PlainWeight)
        compiled, info = self._setup.compiled, module.source.tensors["weight"]
        with self._device.working():
            rows = SourceRows(module.source, self._reader, self._device.host)
            transform = block_transform(rows.format, module.weight, prefer_compiled=compiled)
            out = torch.zeros(rows.columns, device=self._device.name)
            multiple = rows_together(module)
            blocks = row_blocks(
                unit.start, unit.stop, rows.columns, multiple, self._setup.block_bytes
            )
            for start, stop in blocks:
                with naming(info, start):
                    transform.column_absmax(rows.stored_on(self._device, start, stop), out)
                # Once it is here, the block has been read, and its memory may be used again.
                (found,) = self._device.give("column absmax", out)
            return found.clone()

    def product_errors(self, search: _Search, check: Callable[[], None]) -> list[float]:
        """The output error of a module for each candidate.

        Raises:
            InvalidInput: a number of the weight or of a token is not finite.
        """
        smoothing = search.module.smoothing
        assert smoothing is not None
        with open_statistics(self._setup.statistics[smoothing.statistics]) as statistics:
            tokens, measured_as = input_tokens(search.tokens_of, statistics)
        importances = [
            column_importance(self._setup.statistics, search.module, factors)
            for factors in search.candidates
        ]
        with self._device.working():
            errors = ProductErrors(
                search.module,
                SourceRows(search.module.source, self._reader, self._device.host),
                tokens,
                measured_as,
                search.candidates,
                importances,
                self._device,
                self._setup.block_bytes,
                compiled=self._setup.compiled,
            )
            return errors.sums(check)


def find_factors(
    plan: Plan,
    units: Sequence[Unit],
    setup: Setup,
    means: Means,
    journal: Path | None = None,
    kept: Callable[[], None] = lambda: None,
) -> Factors:
    """The factors of every group of a plan; the same whoever works, and in whatever pieces.

    Args:
        plan: what is to be done.
        units: all units of it.
        setup: what the workers are told.
        means: how.
        journal: where groups that are done are noted; ``None``: nowhere.
        kept: called when one was.

    Raises:
        InvalidInput: numbers of the source or the statistics cannot be used.
        OutputError: the journal could not be written.
    """
    if not plan.smoothing_groups:
        return Factors()
    with ExitStack() as stack:
        earlier = [] if journal is None else read_journal(journal)
        stage = _Stage(plan, setup, means, dict(_of_records(plan, earlier)))
        log = None if journal is None else stack.enter_context(closing(Journal(journal)))
        for index in stage.run(units):
            if log is not None:
                log.append([_record(index, stage.done[index])])
                kept()
    groups = tuple(stage.done[index] for index in range(len(plan.smoothing_groups)))
    return Factors.of_plan(plan, groups)


class _Stage:
    def __init__(
        self, plan: Plan, setup: Setup, means: Means, done: dict[int, GroupFactors]
    ) -> None:
        self.groups = plan.smoothing_groups
        self.setup = setup
        self.means = means
        self.done = done
        modules = {(module.part, module.name): module for module in plan.modules}
        self.members = [
            tuple(modules[group.part, name] for name in group.modules) for group in self.groups
        ]
        self.group_of = {
            (group.part, name): index
            for index, group in enumerate(self.groups)
            for name in group.modules
        }

    def run(self, units: Sequence[Unit]) -> Iterator[int]:
        """Do what is left to do; the index of each group as soon as it is in ``done``."""
        left = set(range(len(self.groups))) - self.done.keys()
        if not left:
            return
        inputs = self._inputs(left)
        searches: dict[int, Tensor] = {}
        for index, weights in self._maxima(units, left):
            group = self.groups[index]
            candidates = _candidates(group, inputs[index], weights)
            if len(candidates) == 1:
                self._finish(index, group.smoothing.candidates[0], candidates[0])
                yield index
            else:
                searches[index] = candidates
        yield from self._search(searches)

    def _inputs(self, left: set[int]) -> dict[int, Tensor]:
        """The input maxima of each group; every statistics file is opened once."""
        by_file: dict[str, list[int]] = {}
        for index in sorted(left):
            by_file.setdefault(self.groups[index].smoothing.statistics, []).append(index)
        found: dict[int, Tensor] = {}
        for name, indices in by_file.items():
            with open_statistics(self.setup.statistics[name]) as statistics:
                found |= {index: input_absmax(self.members[index], statistics) for index in indices}
        return found

    def _finish(self, index: int, alpha: float, values: Tensor) -> None:
        group = self.groups[index]
        self.done[index] = GroupFactors(group.part, group.modules, alpha, values.clone())

    def _maxima(self, units: Sequence[Unit], left: set[int]) -> Iterator[tuple[int, Tensor]]:
        """The column maxima of each group over all its members, when its last unit is done."""
        mine = [unit for unit in units if self.group_of.get((unit.of.part, unit.of.name)) in left]
        open_units = dict.fromkeys(left, 0)
        for unit in mine:
            open_units[self.group_of[unit.of.part, unit.of.name]] += 1
        found: dict[int, Tensor] = {}
        for unit, maxima in self._column_maxima(mine):
            self.means.progress(0, unit.of.name)
            index = self.group_of[unit.of.part, unit.of.name]
            found[index] = torch.maximum(found[index], maxima) if index in found else maxima
            open_units[index] -= 1
            if not open_units[index]:
                yield index, found.pop(index)

    def _column_maxima(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Tensor]]:
        if self.means.executor is None:
            sources = (source for unit in units for source in unit.sources())
            found = self._here(units, lambda worker, unit, _: worker.column_absmax(unit), sources)
            yield from zip(units, found, strict=True)
            return
        names = {unit.index: unit for unit in units}
        runs = zip(in_runs(units), cycle(self.means.devices), strict=False)
        tasks = (_MaximaTask(self.setup, run, device) for run, device in runs)
        for results in call_each(self.means.executor, find_column_absmax, tasks):
            for index, maxima in results:
                yield names[index], maxima

    def _search(self, searches: Mapping[int, Tensor]) -> Iterator[int]:
        """Choose alpha for these groups, each with its candidates' factors."""
        tasks = [
            _Search(index, module, self.members[index], candidates)
            for index, candidates in sorted(searches.items())
            for module in self.members[index]
        ]
        found: dict[int, list[list[float]]] = {index: [] for index in searches}
        for task, errors in self._product_errors(tasks):
            self.means.progress(0, task.module.name)
            found[task.group].append(errors)
            if len(found[task.group]) == len(self.members[task.group]):
                totals = [math.fsum(each) for each in zip(*found.pop(task.group), strict=True)]
                best = totals.index(min(totals))  # the first: of equals, the smallest alpha
                alpha = self.groups[task.group].smoothing.candidates[best]
                self._finish(task.group, alpha, task.candidates[best])
                yield task.group

    def _product_errors(self, tasks: Sequence[_Search]) -> Iterator[tuple[_Search, list[float]]]:
        if self.means.executor is None:
            sources = (source for task in tasks for source in sources_of(task.module))
            found = self._here(tasks, FactorWorker.product_errors, sources)
            yield from zip(tasks, found, strict=True)
            return
        calls = (
            _ErrorsTask(self.setup, task, place, device)
            for (place, task), device in zip(
                enumerate(tasks), cycle(self.means.devices), strict=False
            )
        )
        for place, errors in call_each(self.means.executor, find_product_errors, calls):
            yield tasks[place], errors

    def _here(
        self,
        tasks: Iterable[Task],
        do: Callable[[FactorWorker, Task, Callable[[], None]], Result],
        sources: Iterable[tuple[TensorInfo, int, int]],
    ) -> Iterator[Result]:
        """On threads of this process; ``sources`` is what they read, in order."""
        devices = cycle(self.means.devices)
        workers: Workers[FactorWorker] = Workers(
            self.means.workers, lambda: FactorWorker(self.setup, reader, next(devices))
        )
        with one_thread(), SourceReader(self.setup.files, check=workers.check) as reader:
            reader.expect(sources)
            yield from workers.run(_call(do, task, workers.check) for task in tasks)


def _call(
    do: Callable[[FactorWorker, Task, Callable[[], None]], Result],
    task: Task,
    check: Callable[[], None],
) -> Callable[[FactorWorker], Result]:
    return lambda worker: do(worker, task, check)


def _candidates(group: SmoothingGroup, inputs: Tensor, weights: Tensor) -> Tensor:
    """The factors for each candidate of alpha, float32 ``[candidates, in]``."""
    smoothing = group.smoothing
    make = partial(smoothquant_factors, inputs, weights, power_of_two=smoothing.power_of_two)
    return torch.stack([make(alpha) for alpha in smoothing.candidates])


@dataclass(frozen=True, slots=True)
class _MaximaTask:
    setup: Setup
    units: tuple[Unit, ...]
    device: str


@dataclass(frozen=True, slots=True)
class _ErrorsTask:
    setup: Setup
    search: _Search
    place: int
    device: str


def find_column_absmax(task: _MaximaTask) -> list[tuple[int, Tensor]]:
    """In another process: the column maxima of some units, by their index."""
    check_version(task.setup)
    with one_thread(), SourceReader(task.setup.files) as reader:
        reader.expect(source for unit in task.units for source in unit.sources())
        worker = FactorWorker(task.setup, reader, task.device)
        return [(unit.index, worker.column_absmax(unit)) for unit in task.units]


def find_product_errors(task: _ErrorsTask) -> tuple[int, list[float]]:
    """In another process: the output errors of one module, with the place of the task."""
    check_version(task.setup)
    with one_thread(), SourceReader(task.setup.files) as reader:
        reader.expect(sources_of(task.search.module))
        worker = FactorWorker(task.setup, reader, task.device)
        return task.place, worker.product_errors(task.search, lambda: None)


def _record(index: int, found: GroupFactors) -> dict[str, Any]:
    """For the journal."""
    content = found.values.numpy().astype("<f4").tobytes()
    return {"group": index, "alpha": found.alpha, "factors": base64.b64encode(content).decode()}


def _of_records(
    plan: Plan, records: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[int, GroupFactors]]:
    """From the journal."""
    for record in records:
        index = record["group"]
        group = plan.smoothing_groups[index]
        content = np.frombuffer(base64.b64decode(record["factors"]), "<f4").astype(np.float32)
        values = torch.from_numpy(content)
        yield index, GroupFactors(group.part, group.modules, record["alpha"], values)
