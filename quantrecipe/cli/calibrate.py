"""``calibrate``: somebody's own function runs the model; what its modules are handed is kept."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any, Final

import click

from quantrecipe.checkpoint import OutputExists
from quantrecipe.cli.functions import find_function
from quantrecipe.cli.running import reporting
from quantrecipe.cli.tables import table
from quantrecipe.schema.problems import QuantrecipeError

if TYPE_CHECKING:
    from quantrecipe.converter import OpenRecipe
    from quantrecipe.converter.calibration import Calibration, Measurements, ModuleStatistics
    from quantrecipe.schema.problems import Problem
    from quantrecipe.schema.recipe import Recipe

_SPIKIEST: Final = 10


def _edges(_: click.Context, __: click.Parameter, text: str | None) -> list[float] | None:
    """Ascending numbers with commas between them."""
    if text is None:
        return None
    try:
        edges = [float(each) for each in text.split(",")]
    except ValueError:
        edges = []
    ascending = all(low < high for low, high in pairwise(edges))
    if len(edges) < 2 or not ascending or not all(map(math.isfinite, edges)):
        raise click.BadParameter(f"{text!r}: give two or more numbers, ascending: 0,0.5,1.")
    return edges


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    "recipe_name",
    metavar="R",
    help="A recipe file (JSON or YAML), - for standard input, or the name of a built-in recipe: it "
    "says which modules of which parts are measured.",
)
@click.option(
    "--run",
    "function",
    metavar="MODULE:FUNCTION",
    help="What runs the model: a Python function, also of a file in this folder, that takes a "
    "Calibration.",
)
@click.option(
    "--merge", is_flag=True, help="Merge FILES, of runs of the same model, in place of running it."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The statistics file; the one that the recipe names if left out.",
)
@click.option(
    "--timesteps",
    callback=_edges,
    metavar="T,T,...",
    help="Edges of the timestep bins, ascending; one bin for everything if left out.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="K",
    help="Keep so many tokens of each module.",
)
@click.option("--allow-uncalled", is_flag=True, help="Modules that never run are fine.")
@click.option("--force", is_flag=True, help="Replace the file that is there.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def calibrate(
    files: tuple[Path, ...],
    recipe_name: str | None,
    function: str | None,
    merge: bool,
    out: Path | None,
    timesteps: list[float] | None,
    tokens: int,
    allow_uncalled: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Measure what a model's modules are handed while it runs, for smoothing and rankings.

    FUNCTION runs the model as it likes, each part within `with calibration.observe(model, part):`.
    With --merge, FILES are statistics files that become one.

    Under torchrun, what all processes measured is merged, and the first one writes it.
    """
    if merge:
        if not files or out is None or recipe_name is not None or function is not None:
            raise click.UsageError("--merge takes FILES and --out, and no --recipe or --run.")
        with reporting(as_json):
            _merge(files, out, force, as_json)
        return
    if files:
        raise click.UsageError("FILES are for --merge.")
    if recipe_name is None or function is None:
        raise click.UsageError("Give --recipe and --run, or --merge.")
    with reporting(as_json):
        _run(recipe_name, function, out, timesteps, tokens, allow_uncalled, force, as_json)


def _merge(files: tuple[Path, ...], out: Path, force: bool, as_json: bool) -> None:
    from quantrecipe.converter.calibration import merge_statistics

    _show(merge_statistics(files, out, force=force), out, as_json)


def _run(
    recipe_name: str,
    function: str,
    out: Path | None,
    timesteps: list[float] | None,
    tokens: int,
    allow_uncalled: bool,
    force: bool,
    as_json: bool,
) -> None:
    from quantrecipe.converter import open_recipe
    from quantrecipe.converter.calibration import Calibration

    loaded = open_recipe(recipe_name)
    if tokens == 0 and _chooses_alpha(loaded.recipe):
        raise click.UsageError(
            "The recipe has alpha chosen by the tokens that are kept: give --tokens 256, or more."
        )
    path = out or _named(loaded)
    if path.exists() and not force:
        raise OutputExists(path.parent, [path.name])  # before hours of work, and not after
    call = find_function(function, "--run")
    calibration = Calibration(loaded.recipe, timesteps, tokens)
    _called(call, function, calibration)
    measurements = calibration.measurements
    if _reduced(measurements):
        measurements.save(path, allow_uncalled=allow_uncalled, force=force)
        _show(measurements, path, as_json, calibration.unproven())


def _chooses_alpha(recipe: Recipe) -> bool:
    return any(
        scheme.smoothing is not None and len(scheme.smoothing.candidates) > 1
        for scheme in recipe.schemes.values()
    )


def _named(loaded: OpenRecipe) -> Path:
    """The statistics file that a recipe names."""
    from quantrecipe.converter import statistics_files

    named = statistics_files(loaded)
    if len(named) != 1:
        which = " and ".join(sorted(named)) or "no statistics file"
        raise click.UsageError(f"Missing option '--out': the recipe names {which}.")
    return next(iter(named.values()))


def _called(call: Callable[[Calibration], object], function: str, calibration: Calibration) -> None:
    try:
        # What it prints is no result of this command.
        with redirect_stdout(sys.stderr):
            call(calibration)
    except QuantrecipeError:
        raise
    except Exception as error:
        traceback.print_exception(error)
        raise QuantrecipeError(f"--run {function}: {type(error).__name__}: {error}") from error


def _reduced(measurements: Measurements) -> bool:
    """Merge what all processes measured; whether this one writes it."""
    import torch.distributed as dist

    if not dist.is_available():
        return True
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if ours:
        dist.init_process_group("gloo")
    if not dist.is_initialized():
        return True
    try:
        measurements.all_reduce()
        return dist.get_rank() == 0
    finally:
        if ours:
            dist.destroy_process_group()


def _show(
    measurements: Measurements, path: Path, as_json: bool, unproven: Sequence[Problem] = ()
) -> None:
    header = measurements.header()
    found = [
        {"part": part, "module": name, **_facts(measured)}
        for (part, name), measured in measurements.statistics()
    ]
    if as_json:
        value = {"file": str(path)} | header.to_json_value() | {"measured": found}
        value["unproven"] = [problem.as_dict() for problem in unproven]
        click.echo(json.dumps(value, indent=2))
        return
    parts = ", ".join(f"{len(names)} of {part}" for part, names in header.modules.items())
    click.echo(f"{path}: {header.samples} samples, {len(header.timesteps)} timestep bins")
    click.echo(f"modules: {parts}")
    groups = sum(map(len, header.siblings.values()))
    click.echo(f"siblings: {groups} groups of modules that share their input")
    if header.folds:
        click.echo(f"folds: {len(header.folds)} proven")
    if unproven:
        click.echo("folds that were not proven, and that convert will refuse:")
        for problem in unproven:
            click.echo(indent(str(problem), "  "))
    uncalled = len(measurements.uncalled)
    if uncalled:
        click.echo(f"never called: {uncalled}")
    spikiest = sorted(found, key=lambda facts: -(facts["max_to_median"] or math.inf))[:_SPIKIEST]
    rows = [
        (
            facts["part"],
            facts["module"],
            facts["tokens"],
            f"{facts['absmax']:.4g}",
            "inf" if facts["max_to_median"] is None else f"{facts['max_to_median']:.1f}",
            f"{facts['kurtosis']:.1f}",
        )
        for facts in spikiest
    ]
    headers = ["part", "module", "tokens", "largest", "max/median", "kurtosis"]
    click.echo(f"\nspikiest:\n{table(rows, headers, 'llrrrr')}")


def _facts(measured: ModuleStatistics) -> dict[str, Any]:
    """What sorts modules; JSON has no infinity, which is ``None``."""
    ratio = measured.max_to_median()
    assert measured.tokens is not None
    return {
        "tokens": int(measured.tokens.sum()),
        "absmax": float(measured.absmax().max()),
        "max_to_median": ratio if math.isfinite(ratio) else None,
        "kurtosis": measured.kurtosis(),
    }
