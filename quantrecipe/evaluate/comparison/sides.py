"""One of two checkpoints that are compared: opened, and read through the layout that it is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from quantrecipe.checkpoint.config_file import read_config
from quantrecipe.checkpoint.origin import origin_of
from quantrecipe.checkpoint.survey import Piece, survey
from quantrecipe.evaluate.comparison.records import SideFacts, SidePart
from quantrecipe.loaders.identity import Identity
from quantrecipe.loaders.stated import with_rotations
from quantrecipe.schema.config_claims import quantization_of
from quantrecipe.schema.foreign_layouts import is_read, sight
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import PartContents
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.quantization_config import CONFIG_NAME
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.recognition import Verdict, read_all, recognise
from quantrecipe.schema.registry import layout_names, named_layout, resolve_layout
from quantrecipe.schema.tensors import SourceFileInfo, SourcePart


@dataclass(frozen=True, slots=True)
class OpenedPart:
    """A part.

    Attributes:
        source: its files, and the name it goes by.
        location: where they lie below the root.
        layout: what it was read through.
        contents: its modules and other tensors.
    """

    source: SourcePart
    location: str
    layout: Layout
    contents: PartContents


@dataclass(slots=True)
class Side:
    """A checkpoint.

    Attributes:
        path: what was named.
        whole: whether that is a folder: then the names of files in it are its own.
        recipe: what it was made by, if it says.
        parts: by name.
        notes: what is worth knowing.
    """

    path: Path
    whole: bool
    recipe: Recipe | None
    parts: dict[str, OpenedPart] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> tuple[SourceFileInfo, ...]:
        """Every file, once."""
        found = {file.path: file for part in self.parts.values() for file in part.source.files}
        return tuple(found.values())

    def facts(self) -> SideFacts:
        """What it is, for a report."""
        files = self.files
        return SideFacts(
            self.path,
            len(files),
            sum(file.size for file in files),
            self.recipe.name if self.recipe is not None else None,
            tuple(
                SidePart(name, part.location, part.layout.name) for name, part in self.parts.items()
            ),
        )


def open_side(path: Path, layout: str | Layout | None = None) -> Side:
    """Open a checkpoint and find out what it is.

    As for ``inspect``: the lock beside it or the recipe in its metadata says so, else every known
    layout is tried.

    Args:
        path: a safetensors file, an index, a folder with either, or a folder of such folders.
        layout: the layout that it is in, in place of what it says.

    Raises:
        InvalidInput: it cannot be opened, or no layout explains it: its numbers have no meaning.
        SourceError: a file is there and cannot be read.
    """
    given = resolve_layout(layout) if layout is not None else None
    found = survey(path)
    problems: list[Problem] = []
    origin = None if given is not None else origin_of(found, problems)
    if origin is not None and origin.locations:
        found = survey(found.root, origin.locations)
    if found.problems:
        raise InvalidInput(found.problems)
    recipe = origin.recipe if origin is not None else None
    side = Side(path, path.is_dir(), recipe)
    side.notes += found.notes
    side.notes += [f"{problem.where}: {problem.message}" for problem in problems]
    said = given if recipe is None else resolve_layout(recipe.target.layout)
    named = origin is not None and bool(origin.locations)
    for piece in found.pieces:
        _open_piece(side, piece, said, named=named, given=given is not None)
    return side


def _open_piece(side: Side, piece: Piece, said: Layout | None, *, named: bool, given: bool) -> None:
    verdict = _recognised(piece, said, named=named, given=given)
    if not verdict.fits:
        raise InvalidInput(_unexplained(piece, verdict, given=given))
    if said is None:
        side.notes += _doubts(piece, verdict, named=named)
    elif verdict.best.layout.name != said.name:
        side.notes.append(
            f"it says that {piece.location} is in layout {said.name}, and it is in "
            f"{verdict.best.layout.name}"
        )
    layout = verdict.best.layout
    # Of what is in another layout than the recipe's, the recipe says nothing.
    recipe = side.recipe if said is not None and layout.name == said.name else None
    identity = Identity(layout, None, recipe, None, {})
    contents = with_rotations(identity, verdict.best.parts, verdict.best.contents)
    for part in verdict.best.parts:
        name, number = part.name, 2
        while name in side.parts:
            name, number = f"{part.name}_{number}", number + 1
        opened = OpenedPart(part, piece.location, layout, contents[part.name])
        side.parts[name] = replace(opened, source=replace(part, name=name))


def _recognised(piece: Piece, said: Layout | None, *, named: bool, given: bool) -> Verdict:
    """The layout that it says, else the one that fits best, with the ``config.json`` beside it."""
    known = [named_layout(name) for name in layout_names()]
    quantization = quantization_of(config_beside(piece.parts[0])) or {}
    said_there = quantization.get("quant_method")
    method = said_there if isinstance(said_there, str) else None
    first = None
    for layouts in ([said] if said is not None else [], [] if given else known):
        verdict = None
        if layouts:
            verdict = recognise(piece.parts, layouts, named=named, method=method)
        if verdict is not None and verdict.fits:
            return verdict
        first = first or verdict
    assert first is not None
    return first


def _unexplained(piece: Piece, verdict: Verdict, *, given: bool) -> Sequence[Problem]:
    layout, problems = verdict.best.layout.name, verdict.best.problems
    how = f"it does not fit layout {layout!r}"
    if not given:
        how = f"no known layout explains it; nearest is {layout!r}"
    files = piece.parts[0].files
    first = Problem(
        "unknown-layout",
        f"{how}, but {len(problems)} thing(s) in it do not fit, so its numbers cannot be compared",
        hint="quantrecipe inspect tells more; --layout-a and --layout-b name a layout.",
        file=str(files[0].path if len(files) == 1 else piece.parts[0].root),
    )
    return [first, *problems]


def _doubts(piece: Piece, verdict: Verdict, *, named: bool) -> list[str]:
    """What a reader may have taken for something else."""
    notes = []
    layout = verdict.best.layout.name
    rivals = [
        name
        for name in verdict.rivals
        # Layouts often differ in what only other checkpoints have.
        if read_all(named_layout(name), piece.parts, named=named).contents != verdict.best.contents
    ]
    if rivals:
        notes.append(
            f"ambiguous: {', '.join(rivals)} explains {piece.location} as well as "
            f"{layout}; say which with --layout-a or --layout-b"
        )
    first = piece.parts[0]
    metadata = {key: value for file in first.files for key, value in file.metadata.items()}
    sighting = sight(first.tensors, metadata, quantization_of(config_beside(first)))
    if (
        sighting is not None
        and not is_read(sighting, verdict.best)
        and not (sighting.by_config and verdict.best.quantized)
    ):
        notes.append(
            f"{piece.location} looks like {sighting.layout.name} ({sighting.evidence}), which is "
            "not read: its tensors are compared as they are stored"
        )
    return notes


def config_beside(part: SourcePart) -> Mapping[str, object]:
    """The ``config.json`` in the folder of a part; empty where there is none.

    Raises:
        InvalidInput: it is no JSON object.
        SourceError: it cannot be read.
    """
    path = part.root / CONFIG_NAME
    return read_config(path) if path.is_file() else {}
