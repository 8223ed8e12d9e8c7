"""Ranking the modules that a recipe quantizes by how much noise that makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quantrecipe.checkpoint import SourceReader
from quantrecipe.converter.buffers import Buffers
from quantrecipe.converter.calibration import (
    ModuleStatistics,
    StatisticsFile,
    open_statistics,
)
from quantrecipe.converter.engine import Means
from quantrecipe.converter.factor_stage import find_factors
from quantrecipe.converter.factors import Factors
from quantrecipe.converter.measured import column_importance, measured_as
from quantrecipe.converter.planning import RecipeLike, found_siblings, open_recipe, plan
from quantrecipe.converter.protocol import Progress, silent
from quantrecipe.converter.ranking.measuring import Errors, measure
from quantrecipe.converter.ranking.noise import Powers, predicted, ratio
from quantrecipe.converter.ranking.results import (
    Basis,
    Fragility,
    Key,
    Ranking,
    Spikiness,
    WorstBin,
)
from quantrecipe.converter.ranking.ties import across_parts, grouped
from quantrecipe.converter.selection import find_converter
from quantrecipe.converter.units import cut, sources_of
from quantrecipe.converter.workers import Workers
from quantrecipe.converter.working import Setup
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.transform import COMPILED_PAYS_FROM_BYTES
from quantrecipe.schema.dtypes import PlainDType
from quantrecipe.schema.plan import Plan, PlannedModule
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.siblings import Siblings, tie
from quantrecipe.schema.statistics import Statistics


def rank(
    recipe: RecipeLike,
    source: Path | str | None = None,
    *,
    statistics: Path | str | None = None,
    dtype: PlainDType = "bfloat16",
    tie_siblings: bool = True,
    tie_parts: bool = False,
    jobs: int | None = None,
    progress: Progress = silent,
) -> Ranking:
    """Rank the modules that a recipe quantizes, the one that adds most noise first.

    Weights are read in blocks of rows, and quantized as the recipe says. Modules that it protects
    or passes through are not ranked.

    Args:
        recipe: a ``Recipe``, or the path or built-in name of one.
        source: the root of the source, or one safetensors file; ``None``: where the recipe says.
        statistics: a statistics file; ``None``: the one that the recipe names, if it names one.
        dtype: what protected modules would be kept in.
        tie_siblings: whether modules with the same input are protected together.
        tie_parts: whether modules of the same name in several parts are.
        jobs: threads; ``None``: as many as there are cores.
        progress: told of the bytes of weights that are done with.

    Raises:
        InvalidInput: recipe, source or statistics do not hold, or there is nothing to rank.
    """
    loaded = open_recipe(recipe)
    planned = plan(loaded, source)
    with loaded.locating():
        return rank_plan(
            planned,
            statistics=Path(statistics) if statistics is not None else None,
            dtype=dtype,
            tie_siblings=tie_siblings,
            tie_parts=tie_parts,
            jobs=jobs,
            progress=progress,
        )


def quantized_modules(planned: Plan) -> tuple[PlannedModule, ...]:
    """The modules that there are to rank.

    Raises:
        InvalidInput: there are none.
    """
    found = tuple(
        module
        for module in planned.modules
        if module.disposition == "quantized" and isinstance(module.weight, ScaledWeight)
    )
    if not found:
        raise InvalidInput(
            Problem(
                "nothing-to-rank",
                "the recipe quantizes no module",
                hint="Rank a recipe whose rules take modules.",
                pointer="/rules",
            )
        )
    return found


def rank_plan(
    planned: Plan,
    *,
    statistics: Path | None = None,
    dtype: PlainDType = "bfloat16",
    tie_siblings: bool = True,
    tie_parts: bool = False,
    jobs: int | None = None,
    progress: Progress = silent,
) -> Ranking:
    """Rank the modules of a plan. See ``rank``."""
    modules = quantized_modules(planned)
    path = statistics or _own_statistics(planned)
    means = Means(jobs=jobs)
    # Nothing is written: only what they measure by matters to those who find factors.
    setup = Setup.of(planned, find_converter("streaming"), Path(), means.numbers_at_a_time)
    factors = find_factors(planned, cut(planned), setup, means)
    with ExitStack() as stack:
        opened = None if path is None else stack.enter_context(open_statistics(path))
        reader = stack.enter_context(SourceReader(planned.source_files))
        reader.expect(source for module in modules for source in sources_of(module))
        work = _Work(planned, reader, factors, opened, dtype, progress)
        workers = Workers(means.workers, Buffers)
        found = tuple(workers.run(work.task(module) for module in modules))
    families = across_parts(found) if tie_parts else []
    if tie_siblings:
        families += _siblings(planned, None if opened is None else opened.header)
    return Ranking(
        tuple(sorted(found, key=lambda module: (-module.noise, module.key))),
        grouped(found, families),
        dtype,
    )


def _own_statistics(planned: Plan) -> Path | None:
    """The statistics file that the recipe names, if it names one.

    Raises:
        InvalidInput: it names several.
    """
    files = list(planned.statistics.values())
    if len(files) > 1:
        raise InvalidInput(
            Problem(
                "several-statistics",
                f"the schemes name {len(files)} statistics files: "
                f"{', '.join(sorted(planned.statistics))}",
                hint="Say which of them to rank by (--statistics).",
                pointer="/schemes",
            )
        )
    return files[0] if files else None


def _siblings(planned: Plan, measured: Statistics | None) -> list[list[Key]]:
    """Modules with the same input: that the recipe names, or calibration found; or one factor."""
    found: Iterable[Siblings] = ()
    if planned.recipe.siblings is not None:
        names: dict[str, list[str]] = {}
        for module in planned.modules:
            names.setdefault(module.part, []).append(module.name)
        found = tie(planned.recipe.siblings, names).siblings
    elif measured is not None:
        found = found_siblings(planned, measured)
    groups = [(group.part, group.modules) for group in found]
    groups += [(group.part, group.modules) for group in planned.smoothing_groups]
    return [[(part, name) for name in names] for part, names in groups]


@dataclass(frozen=True, slots=True)
class _Work:
    planned: Plan
    reader: SourceReader
    factors: Factors
    statistics: StatisticsFile | None
    dtype: PlainDType
    progress: Progress

    def task(self, module: PlannedModule) -> Callable[[Buffers], Fragility]:
        return lambda buffers: self._rank(module, buffers)

    def _rank(self, module: PlannedModule, buffers: Buffers) -> Fragility:
        inputs = self._inputs(module)
        factors = self.factors.of(module.part, module.name)
        importance = column_importance(self.planned.statistics, module, factors)
        errors = measure(
            module,
            self.reader,
            buffers,
            inputs,
            factors,
            importance,
            compiled=self.planned.source_bytes >= COMPILED_PAYS_FROM_BYTES,
            progress=self.progress,
        )
        assert module.scheme is not None
        columns = errors.columns
        weight_noise = ratio(float(columns.noise.sum()), float(columns.signal.sum()))
        closed, share = None, None
        rotation = None if module.rotation is None else module.rotation.size
        if inputs is not None:
            closed = predicted(inputs, columns, module.activation, factors, rotation)
        if inputs is not None and closed is not None:
            exact = replace(columns, noise=torch.zeros_like(columns.noise))
            alone = predicted(inputs, exact, module.activation, factors, rotation)
            share = ratio(alone.ratio() if alone else 0.0, closed.ratio())
        powers, basis = _best(errors, closed)
        return Fragility(
            part=module.part,
            name=module.name,
            scheme=module.scheme,
            noise=powers.ratio() if powers is not None else weight_noise,
            basis=basis,
            weight_noise=weight_noise,
            predicted=None if closed is None else closed.ratio(),
            activation_share=share,
            measured=None if errors.powers is None else errors.powers.ratio(),
            tokens=_tokens(inputs) if errors.powers is not None else 0,
            spikiness=_spikiness(inputs),
            worst_bin=self._worst_bin(powers),
            blind=basis == "weight" and module.activation is not None,
            extra_bytes=extra_bytes(module, self.dtype),
        )

    def _inputs(self, module: PlannedModule) -> ModuleStatistics | None:
        """What was measured, by its name or by that of a module of the source that it is of."""
        if self.statistics is None:
            return None
        measured = measured_as(module, self.statistics)[0]
        if measured not in self.statistics:
            return None
        return self._checked(module, self.statistics.module(*measured))

    def _checked(self, module: PlannedModule, inputs: ModuleStatistics) -> ModuleStatistics:
        assert self.statistics is not None
        channels, wanted = inputs.input_absmax.shape[1], module.source.in_features
        if channels != wanted:
            raise InvalidInput(
                Problem(
                    "statistics-mismatch",
                    f"{module.name!r} of part {module.part!r} has {wanted} input channels, and "
                    f"{channels} were measured",
                    hint="These are the statistics of another model.",
                    file=str(self.statistics.path),
                )
            )
        return inputs

    def _worst_bin(self, powers: Powers | None) -> WorstBin | None:
        if powers is None or self.statistics is None or len(powers.noise) == 1:
            return None
        index, noise = powers.worst()
        timesteps = self.statistics.header.timesteps[index]
        return WorstBin(timesteps.start, timesteps.stop, noise)


def _best(errors: Errors, closed: Powers | None) -> tuple[Powers | None, Basis]:
    if errors.powers is not None:
        return errors.powers, "tokens"
    return closed, "weight" if closed is None else "moments"


def _tokens(inputs: ModuleStatistics | None) -> int:
    kept = None if inputs is None else inputs.input_tokens
    return 0 if kept is None else len(kept)


def _spikiness(inputs: ModuleStatistics | None) -> Spikiness | None:
    if inputs is None:
        return None
    return Spikiness(inputs.max_to_median(), inputs.kurtosis())


def extra_bytes(module: PlannedModule, dtype: PlainDType) -> int:
    """What a module takes more, or less, when its weight is kept in ``dtype``."""
    kept = {role: tensor.nbytes for role, tensor in module.outputs.items() if role != "bias"}
    numbers = module.source.out_features * module.source.in_features
    return numbers * TORCH_DTYPES[dtype].itemsize - sum(kept.values())
