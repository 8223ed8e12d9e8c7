"""`quantrecipe schema`: the published JSON Schemas, for editors and other programs."""

from __future__ import annotations

from pathlib import Path

import click

from quantrecipe.schema.problems import OutputError
from quantrecipe.schema.published import SCHEMAS, file_name, published_text, schema_id


@click.command()
@click.argument("kind", required=False, type=click.Choice(SCHEMAS))
@click.option(
    "--write",
    is_flag=False,
    flag_value=".",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="[DIR]",
    help="Write the file, or all of them, into DIR (here, if it is left out).",
)
def schema(kind: str | None, write: Path | None) -> None:
    """Print the JSON Schema of a KIND of document, or list the kinds.

    A recipe that says `"$schema": "./recipe.schema.json"` is checked by an editor while it is
    written, once `quantrecipe schema recipe --write` has put that file beside it.
    """
    if write is not None:
        for each in (kind,) if kind else SCHEMAS:
            click.echo(_write(each, write))
    elif kind is not None:
        click.echo(published_text(kind), nl=False)
    else:
        for each in SCHEMAS:
            click.echo(f"{each:<22}{schema_id(each)}")


def _write(kind: str, folder: Path) -> Path:
    """Write one schema file.

    Raises:
        OutputError: the folder cannot be made or written to.
    """
    path = folder / file_name(kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(published_text(kind), "utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error
    return path
