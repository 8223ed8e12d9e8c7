"""`quantrecipe migrate`: a document of an older version, in the current one."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from quantrecipe.schema.document import STDIN, YAML_SUFFIXES, located, read_document
from quantrecipe.schema.migrations import migrate as migrate_value
from quantrecipe.schema.problems import InvalidInput, OutputError


@click.command()
@click.argument("file")
@click.option("--in-place", is_flag=True, help="Rewrite FILE instead of printing the result.")
def migrate(file: str, in_place: bool) -> None:
    """Bring FILE (`-`: standard input) up to the current version of its kind.

    The result is JSON; it goes to standard output. A file that is up to date stays as it is.
    """
    if in_place and (file == STDIN or file.lower().endswith(YAML_SUFFIXES)):
        raise click.UsageError("--in-place writes JSON, so it takes a JSON file.")
    document = read_document(file)
    try:
        migrated = migrate_value(document.value)
    except InvalidInput as error:
        raise located(error, document) from None
    if migrated == document.value:
        click.echo(f"{document.file}: version {migrated['version']} is the current one", err=True)
        if in_place:
            return
    if in_place:
        _replace(Path(file), _render(migrated))
        click.echo(f"{document.file}: now version {migrated['version']}", err=True)
    else:
        click.echo(_render(migrated), nl=False)


def _render(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all; a link stays a link.

    Raises:
        OutputError: it cannot be written.
    """
    path = path.resolve()
    try:
        mode = path.stat().st_mode
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            temporary.chmod(mode)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error
