"""``convert``: the main job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantrecipe.cli.places import Place, open_place, place_of
from quantrecipe.cli.running import reporting, run
from quantrecipe.cli.transcode import Asked, check_lossless, check_usage, infer, summary_of
from quantrecipe.schema.problems import InvalidInput

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from quantrecipe.converter import Converter
    from quantrecipe.converter.executors import ExecutorSpec


@click.command()
@click.option(
    "--recipe",
    "recipe_name",
    metavar="R",
    help="A recipe file (JSON or YAML), - for standard input, or the name of a built-in recipe.",
)
@click.option(
    "--target-layout",
    metavar="LAYOUT",
    help="In place of a recipe: carry the source over into this layout.",
)
@click.option("--layout", metavar="L", help="The source's layout; found out if left out.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    metavar="NAME=LOCATION",
    help="A part and where it lies below SOURCE (file, folder or glob); may be given again.",
)
@click.option(
    "--names", metavar="NAMES", help="What modules are called there: known names, or a file."
)
@click.option(
    "--format",
    "wanted",
    metavar="FORMAT[:GRANULARITY]",
    help="What becomes of modules that LAYOUT does not hold as they are; the nearest if left out.",
)
@click.option(
    "--requantize",
    is_flag=True,
    help="Undo smoothing and rotation that LAYOUT does not hold, and quantize once more.",
)
@click.option(
    "--architecture", metavar="A", help="What a GGUF file says of its model: general.architecture."
)
@click.option(
    "--lossless-only", is_flag=True, help="Refuse a plan in which any number is not kept exactly."
)
@click.argument("source", required=False, type=Place(repositories=True))
@click.option("--out", type=Place(), metavar="DIR", help="The output folder.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option(
    "--converter", default="streaming", show_default=True, help="Who carries the plan out."
)
@click.option(
    "--block-size",
    "block_bytes",
    type=click.IntRange(min=1),
    metavar="BYTES",
    help="About how many bytes of numbers to hold at a time; it never changes what is written.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads to work with; as many as there are cores if left out.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="D",
    help="Where to compute: cpu, cuda, or several GPUs as in cuda:0,cuda:1. It never changes what "
    "is written.",
)
@click.option(
    "--executor",
    default="threads",
    show_default=True,
    metavar="E",
    help="Who works: threads, ray or dask; ray:ADDRESS or dask:ADDRESS for a running cluster.",
)
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Go on from what an interrupted conversion got done, and keep what this one gets done.",
)
@click.option("--force", is_flag=True, help="Replace files of the same names in the output folder.")
@click.option("--offline", is_flag=True, help="Read a repository from the Hub's cache only.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output; no progress.")
def convert(
    recipe_name: str | None,
    target_layout: str | None,
    layout: str | None,
    parts: tuple[str, ...],
    names: str | None,
    wanted: str | None,
    requantize: bool,
    architecture: str | None,
    lossless_only: bool,
    source: Path | str | None,
    out: Path | None,
    dry_run: bool,
    converter: str,
    block_bytes: int | None,
    jobs: int | None,
    device: str,
    executor: str,
    resume: bool,
    force: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """Convert a checkpoint as a recipe says, or into another layout.

    SOURCE is the folder of the source checkpoint or one file, here or in a repository of the Hub
    (hf://owner/name@revision/folder), of which no copy is kept; without it, the recipe says where
    the source is. With --target-layout a recipe is inferred from SOURCE: what LAYOUT holds as it is
    stored is carried over bit for bit. The output appears in DIR only when it is whole and within
    the recipe's bounds.
    """
    asked = Asked(layout, parts, names, wanted, requantize, architecture)
    check_usage(recipe_name, target_layout, source, asked)
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out' (or --dry-run, to see the plan only).")
    # Nothing above this line needs torch: usage errors and --help are quick.
    from quantrecipe.cli.plan_view import plan_json, plan_text, rounded_twice
    from quantrecipe.cli.progress import ProgressLine
    from quantrecipe.cli.summary import summary_json, summary_text
    from quantrecipe.converter import (
        Means,
        carry_out,
        open_recipe,
        plan,
    )

    with reporting(as_json):
        worker = _find_converter(converter)
        spec = _parse_executor(executor)
        devices = _check_devices(device, here=spec.kind == "threads")
        inferred = None
        if target_layout is not None and source is not None:
            inferred = infer(open_place(source, offline=offline), target_layout, asked)
            source = place_of(inferred.root, source)
        loaded = open_recipe(inferred.recipe if inferred is not None else recipe_name or "")
        planned = plan(loaded, source, converter=converter, offline=offline)
        if lossless_only:
            check_lossless(planned)
        if inferred is not None and not as_json:
            click.echo("\n".join(summary_of(inferred, planned)), err=True)
        if dry_run or out is None:
            if as_json:
                more = {} if inferred is None else {"inferred_recipe": inferred.as_json()}
                click.echo(json.dumps(plan_json(planned) | more, indent=2))
                return
            if inferred is not None:
                click.echo(inferred.text)
            click.echo(plan_text(planned))
            return
        worst = rounded_twice(planned)
        if worst is not None and not as_json:
            click.echo(worst, err=True)
        for warning in planned.warnings:
            click.echo(f"warning: {warning}", err=True)
        means = Means(block_bytes, jobs, devices)
        with (
            _executor(spec, jobs) as workers,
            loaded.locating(),
            ProgressLine(planned.source_bytes, quiet=as_json) as progress,
        ):
            done = carry_out(
                planned,
                worker,
                out,
                replace(means, executor=workers, progress=progress.advance),
                resume=resume,
                force=force,
                notice=progress.note,
            )
        click.echo(json.dumps(summary_json(done), indent=2) if as_json else summary_text(done))


@contextmanager
def _usage(option: str, *kinds: str) -> Iterator[None]:
    """Within it, a problem of one of these kinds is a wrong use of an option."""
    try:
        yield
    except InvalidInput as error:
        (problem, *more) = error.problems
        if more or problem.kind not in kinds:
            raise
        message = f"{problem.message}. {problem.hint}"
        raise click.BadParameter(message, param_hint=repr(option)) from error


def _find_converter(name: str) -> Converter:
    from quantrecipe.converter import find_converter

    with _usage("--converter", "unknown-converter"):
        return find_converter(name)


def _check_devices(names: str, *, here: bool) -> tuple[str, ...]:
    from quantrecipe.converter import check_devices

    with _usage("--device", "no-device"):
        return check_devices(names, here=here)


def _parse_executor(text: str) -> ExecutorSpec:
    from quantrecipe.converter.executors import parse_executor

    with _usage("--executor", "unknown-executor", "bad-address"):
        return parse_executor(text)


@contextmanager
def _executor(spec: ExecutorSpec, jobs: int | None) -> Iterator[Executor | None]:
    """The executor; ``None`` for the converter's own threads."""
    from quantrecipe.converter.executors import open_executor

    if spec.kind == "threads":
        yield None
        return
    with open_executor(spec, jobs) as executor:
        yield executor


def main() -> None:
    """The console script ``convert``."""
    run(convert)
