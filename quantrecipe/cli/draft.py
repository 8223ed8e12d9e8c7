"""A drafted recipe for a checkpoint that was examined."""

from __future__ import annotations

import re
from pathlib import Path

from quantrecipe.cli.examining import Examined, rotated
from quantrecipe.schema.base import SOURCE_PATH
from quantrecipe.schema.drafting import DraftSource, draft_recipe
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recognition import Reading, recognise_together


def draft_of(result: Examined, path: Path, file: Path | None) -> tuple[str, list[str]]:
    """The text of a recipe whose source this checkpoint is, and what it leaves out.

    Args:
        result: what was found out about the checkpoint.
        path: the checkpoint, as it was named.
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
            sources.append(DraftSource(piece.location, rotated(reading, result)))
        else:
            refused += reading.problems
            notes.append(f"{piece.location} is left out of the recipe: {why}")
    if not sources:
        hint = "The recipe's source has to be readable; mend it first."
        raise InvalidInput(refused or Problem("no-modules", notes[0], hint, str(path)))
    _, text = draft_recipe(sources, _name(path), _source_path(result.survey.root, file))
    return text, notes


def _left_out(reading: Reading) -> str | None:
    if reading.problems:
        return f"layout {reading.layout.name} does not explain it"
    if not any(contents.modules for contents in reading.contents.values()):
        return "it has no module with a two-dimensional weight"
    return None


def _name(path: Path) -> str:
    resolved = path.resolve()
    name = resolved.name.removesuffix(".index.json").removesuffix(".safetensors")
    return name or "checkpoint"


def _source_path(root: Path, file: Path | None) -> str | None:
    if file is None:
        return None
    folder = file.parent.resolve()
    resolved = root.resolve()
    if not resolved.is_relative_to(folder):
        return None
    text = resolved.relative_to(folder).as_posix()
    return text if re.search(SOURCE_PATH, text) else None
