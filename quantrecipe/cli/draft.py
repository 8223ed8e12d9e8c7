"""A drafted recipe for a checkpoint that was examined."""

from __future__ import annotations

import re
from pathlib import Path

from quantrecipe.checkpoint.folder import GGUF_SUFFIX, SUFFIX
from quantrecipe.checkpoint.hub.repository import HubPath
from quantrecipe.cli.examining import Examined, rotated
from quantrecipe.schema.base import SOURCE_PATH
from quantrecipe.schema.drafting import DraftSource, draft_recipe
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recognition import Reading, recognise_together


def draft_of(result: Examined, path: Location, file: Path | None) -> tuple[str, list[str]]:
    """The text of a recipe whose source this checkpoint is, and what it leaves out.

    Args:
        result: what was found out about the checkpoint.
        path: the checkpoint, as it was named, here or in a repository.
        file: where the recipe will lie; a source below that folder is named in it.

    Raises:
        InvalidInput: the checkpoint cannot be the source of a recipe; every reason is in it.
    """
    if result.foreign:
        names = ", ".join(dict.fromkeys(part.foreign for part in result.parts if part.foreign))
        raise InvalidInput(
            Problem(
                "not-readable-yet",
                f"a recipe cannot read layout {names}",
                hint="Draft from the checkpoint that it was made from, or name readable parts "
                "(--part NAME=LOCATION).",
                file=str(path),
            )
        )
    pieces = result.survey.pieces
    readings = recognise_together(
        [piece.parts for piece in pieces],
        result.layouts,
        named=result.named,
        methods=result.methods,
    )
    sources: list[DraftSource] = []
    notes: list[str] = []
    refused: list[Problem] = []
    for piece, reading in zip(pieces, readings, strict=True):
        why = _left_out(reading)
        if why is None:
            location = _below_repository(result.survey.root, piece.location)
            sources.append(DraftSource(location, rotated(reading, result)))
        else:
            refused += reading.problems
            notes.append(f"{piece.location} is left out of the recipe: {why}")
    if not sources:
        hint = "The recipe's source has to be readable; mend it first."
        raise InvalidInput(refused or Problem("no-modules", notes[0], hint, str(path)))
    _, text = draft_recipe(sources, name_of(path), _where(result.survey.root, file))
    return text, notes


def _left_out(reading: Reading) -> str | None:
    if reading.problems:
        return f"layout {reading.layout.name} does not explain it"
    if not any(contents.modules for contents in reading.contents.values()):
        return "it has no module with a two-dimensional weight"
    return None


def name_of(path: Location) -> str:
    """What to call a recipe for a checkpoint, after its file, folder or repository."""
    if isinstance(path, HubPath):
        name = path.name or path.repository.name.partition("/")[2]
    else:
        assert isinstance(path, Path)
        name = path.resolve().name
    if path.is_dir():
        return name or "checkpoint"
    stem = name.removesuffix(".index.json")
    return stem.removesuffix(SUFFIX).removesuffix(GGUF_SUFFIX) or "checkpoint"


def _where(root: Location, file: Path | None) -> dict[str, str]:
    """What the recipe's ``source`` says of the place of its files."""
    if isinstance(root, HubPath):
        return {"repo": root.repository.name, "revision": root.repository.commit}
    if file is None:
        return {}
    assert isinstance(root, Path)
    folder, resolved = file.parent.resolve(), root.resolve()
    if not resolved.is_relative_to(folder):
        return {}
    text = resolved.relative_to(folder).as_posix()
    return {"path": text} if re.search(SOURCE_PATH, text) else {}


def _below_repository(root: Location, location: str) -> str:
    """A location as ``source.parts`` has it: of a repository, below its own root."""
    return str(root.path / location) if isinstance(root, HubPath) else location
