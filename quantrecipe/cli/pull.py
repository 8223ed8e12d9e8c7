"""``pull``: what a recipe needs of a repository, fetched to this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantrecipe.cli.progress import silence_the_client
from quantrecipe.cli.running import reporting
from quantrecipe.cli.tables import human_bytes, table
from quantrecipe.schema.address import is_address, parse_address

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantrecipe.checkpoint.hub.pulling import Pull
    from quantrecipe.schema.address import HubAddress


@click.command()
@click.argument("what", metavar="RECIPE|hf://…")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="A folder to put the files into; the Hub's cache if left out.",
)
@click.option(
    "--parts",
    metavar="NAMES",
    help="Only these parts of the recipe (or folders of the repository), with commas in between.",
)
@click.option(
    "--pipeline",
    is_flag=True,
    help="Also the other components that a pipeline needs to run: text encoder, VAE, scheduler…",
)
@click.option("--dry-run", is_flag=True, help="Say what would be fetched, and fetch nothing.")
@click.option("--offline", is_flag=True, help="Ask nobody: say whether all of it is here.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output; no progress.")
def pull(
    what: str,
    out: Path | None,
    parts: str | None,
    pipeline: bool,
    dry_run: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """Fetch the weights that a recipe needs, with their index and configuration.

    RECIPE is a recipe with source.repo; hf://owner/name@revision/folder is any repository. What is
    here already is not fetched again; after an interruption, the same command goes on.
    """
    with reporting(as_json):
        from quantrecipe.checkpoint.hub.pulling import plan_pull
        from quantrecipe.checkpoint.hub.pulling import pull as fetch

        address, locations = _source(what)
        planned = plan_pull(
            address,
            locations,
            names=[name.strip() for name in parts.split(",")] if parts else [],
            pipeline=pipeline,
            offline=offline,
            folder=out,
        )
        for note in planned.notes:
            click.echo(f"warning: {note}", err=True)
        if not as_json:
            click.echo(_text(planned))
        folder = None
        if not dry_run:
            if as_json:
                silence_the_client()
            folder = fetch(planned)
        if as_json:
            click.echo(json.dumps(_json(planned, folder), indent=2))
        elif folder is not None:
            click.echo(folder)


def _source(what: str) -> tuple[HubAddress, Mapping[str, str] | None]:
    """The repository, and the parts that a recipe names."""
    if is_address(what):
        return parse_address(what), None
    from quantrecipe.converter import open_recipe
    from quantrecipe.converter.planning import source_address
    from quantrecipe.schema.problems import InvalidInput, Problem

    loaded = open_recipe(what)
    with loaded.locating():
        address = source_address(loaded, None)
        if address is None:
            raise InvalidInput(
                Problem(
                    "no-source",
                    "the recipe names no repository",
                    hint="Write source.repo (and source.revision) into it, or name the repository: "
                    "hf://owner/name@revision.",
                    pointer="/source",
                )
            )
        return address, loaded.recipe.source.parts


def _text(planned: Pull) -> str:
    source = planned.repository
    revision = f" ({source.revision})" if source.revision not in (None, source.commit) else ""
    rows = [
        (file.path, human_bytes(file.size), "here" if file.there else "") for file in planned.files
    ]
    here = planned.size - planned.missing
    more = f"; {human_bytes(here)} of it is here already" if here else ""
    return (
        f"{source.repo} at {source.commit}{revision}\n{table(rows, align='lr')}\n"
        f"{len(planned.files):,} files, {human_bytes(planned.size)}{more}"
    )


def _json(planned: Pull, folder: Path | None) -> dict[str, Any]:
    return {
        "repository": planned.repository.to_json_value(),
        "files": [
            {"path": file.path, "bytes": file.size, "there": file.there} for file in planned.files
        ],
        "bytes": planned.size,
        "fetched": 0 if folder is None else planned.missing,
        "folder": None if folder is None else str(folder),
    }
