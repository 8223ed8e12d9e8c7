"""The main job: plan, check, stage, convert, hold to the bounds, lock, publish."""

from __future__ import annotations

import time
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from quantrecipe.checkpoint import Staging, check_destination, lay_out, locate
from quantrecipe.checkpoint.durable import output_error
from quantrecipe.converter.checking import check_bounds, check_constants, module_results
from quantrecipe.converter.devices import CPU, check_devices
from quantrecipe.converter.engine import Means, Worked, work
from quantrecipe.converter.factor_stage import FACTORS_NAME, find_factors
from quantrecipe.converter.factors import Factors, folded_file
from quantrecipe.converter.locking import make_lock
from quantrecipe.converter.planning import RecipeLike, open_recipe, plan
from quantrecipe.converter.protocol import Converter, Progress, silent
from quantrecipe.converter.resuming import (
    Earlier,
    Notice,
    plan_key,
    plan_record,
    still_there,
    take_up,
)
from quantrecipe.converter.selection import find_converter
from quantrecipe.converter.sidecars import Sidecar, find_sidecars
from quantrecipe.converter.units import Unit, cut
from quantrecipe.converter.working import BrokenConverter, Setup
from quantrecipe.schema.canonical import document_bytes
from quantrecipe.schema.folds import FOLDED_NAME
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import LOCK_NAME, RECIPE_NAME, Lock
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.problems import InvalidInput, OutputError
from quantrecipe.schema.provenance import written_paths


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was done.

    Attributes:
        out: the folder that holds the result.
        lock: what was written, with digests and errors.
        source_bytes, output_bytes: bytes of tensors read; bytes of files written.
        seconds: from the first byte read to the folder published.
    """

    out: Path
    lock: Lock
    source_bytes: int
    output_bytes: int
    seconds: float


def unheard(text: str) -> None:
    """A ``Notice`` that nobody reads."""


def convert(
    recipe: RecipeLike,
    source: Path | str | None,
    out: Path | str,
    *,
    converter: str = "streaming",
    block_bytes: int | None = None,
    jobs: int | None = None,
    device: str = CPU,
    executor: Executor | None = None,
    resume: bool = True,
    force: bool = False,
    offline: bool = False,
    progress: Progress = silent,
    notice: Notice = unheard,
) -> Conversion:
    """Convert a checkpoint as a recipe says, into a folder that appears only when it is whole.

    Args:
        recipe: a ``Recipe``, or the path or built-in name of one.
        source: the root of the source, or one safetensors file, here or in a repository
            (``hf://owner/name@revision``); ``None``: where the recipe says.
        out: the output folder.
        converter: the name of whoever carries it out.
        block_bytes: about how many bytes of numbers to hold at a time; ``None``: what suits the
            device. It never changes a byte.
        jobs: threads to work with; ``None``: as many as there are cores. It never changes a byte.
        device: where to compute: ``cpu``, ``cuda``, or several as in ``cuda:0,cuda:1``. It never
            changes a byte.
        executor: any ``concurrent.futures.Executor`` to work in place of threads; its workers must
            see source and output under the same paths, and have the same version of this package.
        resume: whether to go on from what an interrupted attempt got done, and to keep what this
            one got done if it is interrupted.
        force: whether files of the same names in ``out`` are replaced.
        offline: whether a repository is read from the Hub's cache only.
        progress: called with bytes done and the module's name.
        notice: called with what a user may want to know: that work is taken up, or why it is not.

    Raises:
        InvalidInput: the recipe, the source or a bound does not hold; nothing is published.
        OutputError: the output cannot be written.
        HubError: the repository that the source is in cannot be read.
    """
    loaded = open_recipe(recipe)
    means = Means(
        block_bytes, jobs, check_devices(device, here=executor is None), executor, progress
    )
    with loaded.locating():
        return carry_out(
            plan(loaded, source, converter=converter, offline=offline),
            find_converter(converter),
            Path(out),
            means,
            resume=resume,
            force=force,
            notice=notice,
        )


def carry_out(
    planned: Plan,
    converter: Converter,
    out: Path,
    means: Means | None = None,
    *,
    resume: bool = True,
    force: bool = False,
    notice: Notice = unheard,
) -> Conversion:
    """Carry out a plan. See ``convert``."""
    means = means or Means()
    started = time.monotonic()
    sidecars = find_sidecars(planned)
    paths = _output_paths(planned, sidecars)
    kept = _read_from(planned, sidecars)
    _keep_source(kept, out, paths)
    check_destination(out, paths, force)
    check_constants(planned)
    record = plan_record(planned, converter)
    with Staging(out, f"output-{plan_key(record)}") as staging:
        try:
            earlier = take_up(staging, record, resume=resume, notice=notice)
            units = cut(planned)
            factors, worked = _work(planned, units, converter, staging, earlier, means, notice)
            results = module_results(planned, units, worked.units, converter)
            check_bounds(planned, results)
            small = _small_files(planned, sidecars, factors)
            lock = make_lock(planned, converter, results, factors, worked, small)
            small[LOCK_NAME] = document_bytes(lock.to_json_value())
            for path, content in small.items():
                _put(staging.folder, path, content)
            old = staging.replaced_lock(LOCK_NAME)
            stale = [path for path in _paths_of(old) if (out / path).resolve() not in kept]
            staging.publish(force=force, lock=LOCK_NAME, order=paths, stale=stale)
        except BaseException as error:
            staging.keep &= resume and _may_succeed_later(error)
            if staging.keep:
                notice(
                    f"what was done is kept in {staging.root}; the same command goes on from there"
                )
            raise
    return Conversion(
        out, lock, planned.source_bytes, planned.output_bytes, time.monotonic() - started
    )


def _work(
    planned: Plan,
    units: tuple[Unit, ...],
    converter: Converter,
    staging: Staging,
    earlier: Earlier,
    means: Means,
    notice: Notice,
) -> tuple[Factors, Worked]:
    lay_out(planned.files, staging.folder)
    if earlier.units:
        there = still_there(staging.folder, units, earlier, means.workers)
        earlier = Earlier({result.index: result for result in there}, earlier.sources)
        notice(f"going on: {len(earlier.units):,} of {len(units):,} units were done")
    staging.keep = bool(earlier.units)

    def keep() -> None:
        staging.keep = True

    setup = Setup.of(planned, converter, staging.folder, means.numbers_at_a_time)
    journal = staging.root / FACTORS_NAME
    factors = find_factors(planned, units, setup, means, journal, keep)
    return factors, work(planned, units, setup, factors, staging, earlier, means)


def _may_succeed_later(error: BaseException) -> bool:
    """Whether the same command could go on from here: not where recipe or numbers are refused."""
    if not isinstance(error, InvalidInput):
        return not isinstance(error, BrokenConverter)
    return all(problem.kind == "source-changed" for problem in error.problems)


def _small_files(
    planned: Plan, sidecars: tuple[Sidecar, ...], factors: Factors
) -> dict[str, bytes]:
    """Everything beside the tensors, but for the lock, which vouches for it."""
    return {
        **{sidecar.path: sidecar.content for sidecar in sidecars},
        **planned.extra_files,
        **({FOLDED_NAME: folded_file(factors.folds)} if planned.folds else {}),
        RECIPE_NAME: document_bytes(planned.recipe.to_json_value()),
    }


def _put(folder: Path, path: str, content: bytes) -> None:
    target = locate(folder, path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    except OSError as error:
        raise output_error(target, error, len(content)) from error


def _output_paths(planned: Plan, sidecars: tuple[Sidecar, ...]) -> tuple[str, ...]:
    """In the order in which they may be replaced: what vouches for the rest comes last."""
    return (
        *(file.path for file in planned.files),
        *(sidecar.path for sidecar in sidecars),
        *planned.extra_files,
        *([FOLDED_NAME] if planned.folds else []),
        RECIPE_NAME,
        LOCK_NAME,
    )


def _read_from(planned: Plan, sidecars: tuple[Sidecar, ...]) -> frozenset[Path]:
    """Every file on this machine that the output is made of, symlinks resolved."""
    files: list[Location | None] = [file.path for file in planned.source_files]
    files += [sidecar.origin for sidecar in sidecars]
    files += planned.statistics.values()
    return frozenset(file.resolve() for file in files if isinstance(file, Path))


def _keep_source(kept: frozenset[Path], out: Path, paths: tuple[str, ...]) -> None:
    """The source is never what gets replaced, not even with force."""
    for path in paths:
        if (out / path).resolve() in kept:
            raise OutputError(
                f"{out / path}: belongs to the source, which is never replaced\n"
                "  Choose another output folder."
            )


def _paths_of(lock: Path) -> tuple[str, ...]:
    """Files that an earlier conversion into the same folder wrote."""
    try:
        return written_paths(lock.read_bytes())
    except OSError:
        return ()
