"""Finding out what a checkpoint is: its files, its layout, where it comes from, what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from quantrecipe.checkpoint.config_file import read_config
from quantrecipe.checkpoint.origin import Origin, origin_of
from quantrecipe.checkpoint.scale_values import check_scales
from quantrecipe.checkpoint.survey import Piece, Survey, survey
from quantrecipe.schema.config_claims import config_problems, model_type, quantization_of
from quantrecipe.schema.dtypes import is_plain
from quantrecipe.schema.foreign_layouts import Sighting, foreign_problems, sight
from quantrecipe.schema.inspection import (
    PartReport,
    report_foreign,
    report_reading,
)
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.lock import LOCK_NAME
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recognition import Reading, Verdict, recognise
from quantrecipe.schema.registry import layout_names, named_layout, resolve_layout
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.suspicions import (
    idle_markers,
    packed_weights,
    scale_tensors,
    stray_scales,
)
from quantrecipe.schema.tensors import TensorInfo

_SIDECARS: Final = (".json", ".model", ".txt")


@dataclass(slots=True)
class Examined:
    """What was found out about a checkpoint.

    Attributes:
        survey: its files.
        origin: what it says it was made by.
        layouts: those that were considered.
        named: whether the names of its parts are known, rather than made up or found.
        parts: what each consists of.
        foreign: whether it is, in part or whole, in a layout that is not read.
        problems: what is wrong; notes: what is worth knowing.
        sidecars: small files beside it, with what they say.
    """

    survey: Survey
    origin: Origin | None
    layouts: tuple[Layout, ...]
    named: bool
    parts: list[PartReport] = field(default_factory=list)
    foreign: bool = False
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sidecars: dict[str, str] = field(default_factory=dict)


def parse_parts(parts: Iterable[str]) -> dict[str, str] | None:
    """What options ``--part NAME=LOCATION`` say; ``None``: there are none.

    Raises:
        click.UsageError: one is something else, or two name the same part.
    """
    found: dict[str, str] = {}
    for text in parts:
        name, separator, location = text.partition("=")
        if not name or not separator or not location:
            raise click.UsageError(f"--part {text!r}: give NAME=LOCATION.")
        if name in found:
            raise click.UsageError(f"--part names {name!r} twice.")
        found[name] = location
    return found or None


def examine(
    path: Path, layout: str | None = None, parts: Mapping[str, str] | None = None
) -> Examined:
    """Find out everything that headers, small files and the values of scales tell.

    Args:
        path: a safetensors or index file, or a folder.
        layout: the name of the layout it is in; it is found out if left out.
        parts: part name to location, likewise.

    Raises:
        InvalidInput: nothing could be opened, or there is no such layout.
        SourceError: a file is there and cannot be read.
    """
    given = named_layout(layout) if layout is not None else None
    found = survey(path, parts)
    problems: list[Problem] = []
    origin = None if given is not None or parts is not None else origin_of(found, problems)
    if origin is not None and origin.locations:
        found = survey(found.root, origin.locations)
    layouts = tuple(named_layout(name) for name in layout_names())
    if given is not None:
        layouts = (given,)
    elif origin is not None:
        layouts = (resolve_layout(origin.recipe.target.layout),)
    named = parts is not None or bool(origin is not None and origin.locations)
    result = Examined(found, origin, layouts, named)
    result.problems += [*found.problems, *problems]
    result.notes += found.notes
    scales: dict[tuple[Path, str], TensorInfo] = {}
    if found.root.is_dir():
        _note_sidecars(found.root, result)
    for piece in found.pieces:
        reading = _examine_piece(piece, result, declared=given is not None)
        if reading is not None:
            scales |= {(info.file, info.name): info for info in scale_tensors(reading).values()}
    check = check_scales(found.files, list(scales.values()))
    result.problems += check.problems
    if check.skipped:
        result.notes.append(f"the values of {check.skipped} scale tensor(s) were not looked at")
    result.problems = list(dict.fromkeys(result.problems))
    return result


def _examine_piece(piece: Piece, result: Examined, *, declared: bool) -> Reading | None:
    first = piece.parts[0]
    metadata = {key: value for file in first.files for key, value in file.metadata.items()}
    config, config_file = _config_of(first.root, result)
    quantization = quantization_of(config)
    declared = declared or result.origin is not None
    sighting = None if declared else sight(first.tensors, metadata, quantization)
    verdict = recognise(piece.parts, result.layouts, named=result.named)
    reading = verdict.best
    coded = not reading.quantized and _any_coded(first.tensors)
    known = verdict.fits and sighting is not None and sighting.layout.name == reading.layout.name
    if sighting is not None and not known and (coded or not sighting.by_config):
        result.foreign = True
        result.parts += [report_foreign(part, piece.location, sighting) for part in piece.parts]
        result.problems += foreign_problems(sighting.layout, first.tensors, metadata)
        quantized: list[str] = []
    else:
        result.parts += report_reading(
            reading,
            piece.location,
            sure=verdict.fits or declared,
            reason=_reason(verdict, result, declared),
        )
        result.problems += reading.problems
        if not declared:
            every = [named_layout(name) for name in layout_names()]
            result.problems += stray_scales(reading, every)
            result.problems += packed_weights(reading)
        result.problems += idle_markers(reading)
        quantized = [m.name for m in reading.modules() if isinstance(m.weight, ScaledWeight)]
        result.notes += _notes(verdict, sighting)
    if quantization is not None:
        result.problems += config_problems(quantization, first.tensors, quantized, str(config_file))
    return reading if quantized else None


def _any_coded(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether there are matrices of anything but plain numbers."""
    return any(len(info.shape) >= 2 and not is_plain(info.dtype) for info in tensors.values())


def _reason(verdict: Verdict, result: Examined, declared: bool) -> str:
    reading = verdict.best
    count = len(reading.problems)
    misfit = f"{count} thing{' in it does' if count == 1 else 's in it do'} not fit"
    if declared:
        how = result.origin.evidence if result.origin is not None else "as --layout says"
        return how if verdict.fits else f"{how}; {misfit}"
    if not verdict.fits:
        return f"no known layout explains it; nearest is {reading.layout.name}, but {misfit}"
    if not reading.quantized:
        return "nothing in it is quantized"
    return f"explains its {reading.quantized} quantized modules and every other tensor"


def _notes(verdict: Verdict, sighting: Sighting | None) -> Iterator[str]:
    reading = verdict.best
    if verdict.rivals and verdict.fits:
        yield (
            f"ambiguous: {', '.join(verdict.rivals)} explains it as well as {reading.layout.name}; "
            "say which with --layout"
        )
    if sighting is not None and reading.quantized:
        yield (
            f"{sighting.evidence} ({sighting.layout.written_by}); "
            f"its tensors are those of layout {reading.layout.name}"
        )


def _config_of(folder: Path, result: Examined) -> tuple[Mapping[str, Any], Path]:
    """The ``config.json`` of a folder, empty if there is none; small files are noted."""
    _note_sidecars(folder, result)
    path = folder / "config.json"
    config: Mapping[str, Any] = {}
    if path.is_file():
        try:
            config = read_config(path)
        except InvalidInput as error:
            result.problems += error.problems
        result.sidecars[_below(path, result.survey.folder)] = model_type(config) or ""
    return config, path


def _note_sidecars(folder: Path, result: Examined) -> None:
    # Beside a single file there may be anything.
    whole = result.survey.root.is_dir()
    for file in sorted(folder.iterdir()):
        known = file.suffix in _SIDECARS if whole else file.name == LOCK_NAME
        if known and file.is_file():
            result.sidecars.setdefault(_below(file, result.survey.folder), "")


def _below(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)
