"""``convert``: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantrecipe.cli.running import reporting, run
from quantrecipe.schema.problems import InvalidInput

if TYPE_CHECKING:
    from quantrecipe.converter import Converter


class _Place(click.Path):
    """A path; not the empty one, which would stand for the working folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty (a variable that is not set?); '.' is the working folder.")
        return super().convert(value, param, ctx)


@click.command()
@click.option(
    "--recipe",
    "recipe_name",
    required=True,
    metavar="R",
    help="A recipe file (JSON or YAML), - for standard input, or the name of a built-in recipe.",
)
@click.argument("source", required=False, type=_Place(path_type=Path))
@click.option("--out", type=_Place(path_type=Path), metavar="DIR", help="The output folder.")
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
@click.option("--force", is_flag=True, help="Replace files of the same names in the output folder.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output; no progress.")
def convert(
    recipe_name: str,
    source: Path | None,
    out: Path | None,
    dry_run: bool,
    converter: str,
    block_bytes: int | None,
    jobs: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Convert a checkpoint as a recipe says.

    SOURCE is the folder of the source checkpoint or one safetensors file; without it, the recipe
    says where the source is. The output appears in DIR only when it is whole and within the
    recipe's bounds.
    """
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out' (or --dry-run, to see the plan only).")
    # Nothing above this line needs torch: usage errors and --help are quick.
    from quantrecipe.cli.plan_view import plan_json, plan_text
    from quantrecipe.cli.progress import ProgressLine
    from quantrecipe.cli.summary import summary_json, summary_text
    from quantrecipe.converter import DEFAULT_BLOCK_BYTES, carry_out, open_recipe, plan

    with reporting(as_json):
        worker = _find_converter(converter)
        loaded = open_recipe(recipe_name)
        planned = plan(loaded, source, converter=converter)
        if dry_run or out is None:
            click.echo(json.dumps(plan_json(planned), indent=2) if as_json else plan_text(planned))
            return
        for warning in planned.warnings:
            click.echo(f"warning: {warning}", err=True)
        with loaded.locating(), ProgressLine(planned.source_bytes, quiet=as_json) as progress:
            done = carry_out(
                planned,
                worker,
                out,
                block_bytes=block_bytes or DEFAULT_BLOCK_BYTES,
                jobs=jobs,
                force=force,
                progress=progress.advance,
            )
        click.echo(json.dumps(summary_json(done), indent=2) if as_json else summary_text(done))


def _find_converter(name: str) -> Converter:
    from quantrecipe.converter import find_converter

    try:
        return find_converter(name)
    except InvalidInput as error:
        (problem,) = error.problems
        if problem.kind != "unknown-converter":
            raise
        message = f"{problem.message}. {problem.hint}"
        raise click.BadParameter(message, param_hint="'--converter'") from error


def main() -> None:
    """The console script ``convert``."""
    run(convert)
