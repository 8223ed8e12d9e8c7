"""``inspect``: what a checkpoint is, and what looks wrong with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from quantrecipe.cli.examining import Examined, examine, parse_parts
from quantrecipe.cli.inspect_view import inspection_json, inspection_text
from quantrecipe.cli.places import Place, open_place
from quantrecipe.cli.running import report, reporting
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import InvalidInput, OutputError

STDOUT = "-"


@click.command()
@click.argument("path", type=Place(repositories=True))
@click.option("--layout", metavar="L", help="The layout it is in; found out if left out.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    metavar="NAME=LOCATION",
    help="A part and where it lies below PATH (file, folder or glob); may be given again.",
)
@click.option("--json", "as_json", is_flag=True, help="The same facts, machine-readable.")
@click.option("--all", "every", is_flag=True, help="Leave nothing out of long tables and lists.")
@click.option(
    "--emit-recipe",
    "emit",
    is_flag=False,
    flag_value=STDOUT,
    metavar="[FILE]",
    help="Draft a recipe whose source this is, into a new FILE or instead of the report.",
)
@click.pass_context
def inspect(
    ctx: click.Context,
    path: Path | str,
    layout: str | None,
    parts: tuple[str, ...],
    as_json: bool,
    every: bool,
    emit: str | None,
) -> None:
    """Say what a checkpoint is, and what looks wrong with it.

    PATH is a safetensors file, an index, a folder with either, or a folder of such folders, here or
    in a repository of the Hub (hf://owner/name@revision/folder). Headers and the values of scales
    are read, nothing else. Exit code 0: nothing looks wrong; 1: something does.
    """
    if as_json and emit == STDOUT:
        raise click.UsageError("--json and --emit-recipe without a FILE both write to stdout.")
    with reporting(as_json):
        place = open_place(path)
        result = examine(place, layout, parse_parts(parts))
        if as_json:
            click.echo(json.dumps(inspection_json(result), indent=2))
        elif emit != STDOUT:
            click.echo(inspection_text(result, every=every))
        if emit is not None:
            _emit(result, place, emit)
    ctx.exit(1 if result.problems else 0)


def _emit(result: Examined, path: Location, emit: str) -> None:
    from quantrecipe.cli.draft import draft_of

    file = None if emit == STDOUT else Path(emit)
    if file is not None and os.path.lexists(file):
        raise OutputError(f"{file}: is there already\n  Name a file that does not exist yet.")
    try:
        text, notes = draft_of(result, path, file)
    except InvalidInput as error:
        raise InvalidInput(dict.fromkeys([*result.problems, *error.problems])) from None
    for note in notes:
        click.echo(f"note: {note}", err=True)
    if file is None:
        if result.problems:
            report(InvalidInput(result.problems))
        click.echo(text, nl=False)
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror or error}") from error
    click.echo(f"wrote {file}", err=True)
