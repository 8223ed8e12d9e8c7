"""`quantrecipe validate`: recipes, layouts, locks and statistics headers held to their schema."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import click

from quantrecipe.cli.reporters import REPORTERS, FileResult
from quantrecipe.schema.document import STDIN, Document
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.validation import Examined, examine


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATHS...")
@click.option(
    "--format",
    "report_format",
    type=click.Choice(list(REPORTERS)),
    default="text",
    show_default=True,
    help="How to say what was found.",
)
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, path_type=Path),
    help="Check the rules of recipes against the headers of this source, too.",
)
@click.pass_context
def validate(
    context: click.Context, paths: tuple[str, ...], report_format: str, checkpoint: Path | None
) -> None:
    """Check documents of any kind: recipes, layouts, locks, statistics headers.

    PATHS are files, glob patterns (`recipes/**/*.json`) or `-` for standard input; .yaml and .yml
    files are read as YAML, all others as JSON. Every problem is reported, with its place.

    Exits with 0 if all are valid, 1 if some are not, 2 if there is nothing to check.
    """
    results = [_check(path, checkpoint) for path in _expand(paths)]
    click.echo(REPORTERS[report_format](results), nl=False)
    context.exit(1 if any(result.problems for result in results) else 0)


def _expand(paths: tuple[str, ...]) -> list[str]:
    """The files that are meant, each once, in the order they were named.

    Raises:
        click.UsageError: a path is a folder, or there is no such file.
    """
    found: dict[str, None] = {}
    for path in paths:
        if path == STDIN or os.path.isfile(path):  # noqa: PTH113 - patterns are no paths
            found[path] = None
            continue
        if os.path.isdir(path):  # noqa: PTH112
            pattern = os.path.join(path, "*.json")  # noqa: PTH118
            raise click.UsageError(f"{path!r} is a folder; name its files, as in {pattern!r}.")
        matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207
        files = [match for match in matches if not os.path.isdir(match)]  # noqa: PTH112
        if not files and not os.path.lexists(path):
            what = "No file matches" if glob.has_magic(path) else "There is no file"
            raise click.UsageError(f"{what} {path!r}.")
        found.update(dict.fromkeys(files or [path]))
    return list(found)


def _check(path: str, checkpoint: Path | None) -> FileResult:
    try:
        examined = examine(path)
    except InvalidInput as error:
        return FileResult(path, None, error.problems)
    return FileResult(path, examined.kind, examined.problems or _against(examined, checkpoint))


def _against(examined: Examined, checkpoint: Path | None) -> tuple[Problem, ...]:
    """What does not hold for the checkpoint; only a recipe says anything of one."""
    document, model = examined.document, examined.model
    if checkpoint is None or document is None or not isinstance(model, Recipe):
        return ()
    return _problems_against_checkpoint(document, model, checkpoint)


def _problems_against_checkpoint(
    document: Document, recipe: Recipe, checkpoint: Path
) -> tuple[Problem, ...]:
    # Only who asks for it pays for importing the planner.
    from quantrecipe.checkpoint import open_parts
    from quantrecipe.schema.planning import check_selection

    try:
        found = check_selection(recipe, open_parts(checkpoint, recipe.source.parts))
    except InvalidInput as error:
        found = error.problems
    return tuple(document.locate(problem) for problem in found)
