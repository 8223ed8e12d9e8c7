"""Finding out what a checkpoint is: its files, its layout, where it comes from, what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import click

from quantrecipe.checkpoint.coarse_values import coarse_weights
from quantrecipe.checkpoint.config_file import read_config
from quantrecipe.checkpoint.origin import Origin, origin_of
from quantrecipe.checkpoint.scale_values import check_records, check_scales
from quantrecipe.checkpoint.survey import Piece, Survey, survey
from quantrecipe.cli.constants import constant_problems
from quantrecipe.cli.noting import layout_notes, names_notes, not_read_notes
from quantrecipe.schema.config_claims import config_problems, model_type, quantization_of
from quantrecipe.schema.dtypes import is_plain
from quantrecipe.schema.factors import factors, record_weights
from quantrecipe.schema.foreign_layouts import foreign_problems, is_read, sight
from quantrecipe.schema.inspection import (
    PartReport,
    report_foreign,
    report_reading,
)
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import NOT_READ, StoredModule
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import LOCK_NAME
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.provenance import with_rotations
from quantrecipe.schema.recognition import Reading, Verdict, read_all, recognise, writes_config
from quantrecipe.schema.registry import layout_names, named_layout, resolve_layout
from quantrecipe.schema.suspicions import (
    idle_markers,
    packed_weights,
    stray_scales,
    torchao_problems,
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
        not_read: what its own program reads and this one does not.
        sidecars: small files beside it, with what they say.
        methods: ``quant_method`` of the ``config.json`` beside each piece.
    """

    survey: Survey
    origin: Origin | None
    layouts: tuple[Layout, ...]
    named: bool
    parts: list[PartReport] = field(default_factory=list)
    foreign: bool = False
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_read: list[Problem] = field(default_factory=list)
    methods: list[str | None] = field(default_factory=list)
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
    path: Location, layout: str | None = None, parts: Mapping[str, str] | None = None
) -> Examined:
    """Find out everything that headers, small files and the values of scales tell.

    Args:
        path: a safetensors or index file, or a folder, here or in a repository.
        layout: the name of the layout it is in; it is found out if left out.
        parts: part name to location, likewise.

    Raises:
        InvalidInput: nothing could be opened, or there is no such layout.
        SourceError: a file is there and cannot be read.
        HubError: a repository cannot be read.
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
    if found.root.is_dir():
        _note_sidecars(found.root, result)
    modules: dict[tuple[Location, str], StoredModule] = {}
    for piece in found.pieces:
        reading = _examine_piece(piece, result, declared=given is not None)
        for module in reading.modules() if reading is not None else ():
            weight = module.tensors["weight"]
            modules.setdefault((weight.file, weight.name), module)
    _examine_values(result, list(modules.values()))
    result.problems = list(dict.fromkeys(result.problems))
    result.notes = list(dict.fromkeys(result.notes))
    return result


def _examine_values(result: Examined, modules: list[StoredModule]) -> None:
    files = result.survey.files
    check = check_scales(files, list(factors(modules).values()))
    result.problems += check.problems
    result.problems += check_records(files, record_weights(modules))
    result.problems += constant_problems(files, modules)
    if check.skipped:
        result.notes.append(f"the values of {check.skipped} scale tensor(s) were not looked at")
    coarse = coarse_weights(files, modules)
    if coarse.names:
        more = f" and {len(coarse.names) - 1} more" if len(coarse.names) > 1 else ""
        result.notes.append(
            f"{len(coarse.names)} of {coarse.looked_at} weights that were looked at "
            f"({coarse.names[0]}{more}) have at most 16 different numbers in each run of 32 "
            "columns: they were quantized to 4 bits before, and what was lost then is not in them"
        )


def _examine_piece(piece: Piece, result: Examined, *, declared: bool) -> Reading | None:
    """What a piece is; gives what was read of it, unless it is in a layout that is not read."""
    first = piece.parts[0]
    metadata = {key: value for file in first.files for key, value in file.metadata.items()}
    config, config_file = _config_of(first.root, result)
    quantization = quantization_of(config)
    said = quantization.get("quant_method") if quantization is not None else None
    method = said if isinstance(said, str) else None
    result.methods.append(method)
    declared = declared or result.origin is not None
    sighting = None if declared else sight(first.tensors, metadata, quantization)
    verdict = recognise(piece.parts, result.layouts, named=result.named, method=method)
    reading = verdict.best
    coded = not reading.quantized and _any_coded(first.tensors)
    modules: dict[str, StoredModule] = {}
    if (
        sighting is not None
        and not is_read(sighting, reading)
        and (coded or not sighting.by_config)
    ):
        result.foreign = True
        result.parts += [report_foreign(part, piece.location, sighting) for part in piece.parts]
        result.problems += foreign_problems(sighting, first.tensors, quantization)
    else:
        reading = rotated(reading, result)
        wrong = _faults(reading)
        result.not_read += _not_read(reading)
        result.parts += report_reading(
            reading,
            piece.location,
            sure=not wrong or declared,
            reason=_reason(verdict, result, method, declared=declared),
        )
        result.problems += wrong
        result.problems += idle_markers(reading)
        result.problems += torchao_problems(reading)
        if not declared:
            every = [named_layout(name) for name in layout_names()]
            result.problems += stray_scales(reading, every)
            result.problems += packed_weights(reading)
            result.notes += layout_notes(verdict, quantization)
        result.notes += not_read_notes(reading)
        result.notes += names_notes(reading)
        modules = {module.name: module for module in reading.modules()}
    if quantization is not None:
        wrong = list(config_problems(quantization, first.tensors, modules, str(config_file)))
        if not wrong and modules and not declared:
            wrong += _unlike_config(verdict, method, str(config_file))
        result.problems += wrong
    return reading if modules else None


def rotated(reading: Reading, result: Examined) -> Reading:
    """What the recipe that made it, or the ``config.json`` beside it, says of rotated modules."""
    recipe = result.origin.recipe if result.origin is not None else None
    try:
        if recipe is None:
            contents = {
                part.name: with_rotations(reading.layout, part, reading.contents[part.name])
                for part in reading.parts
            }
        elif any(scheme.rotation is not None for scheme in recipe.schemes.values()):
            # Needs torch, as all of that room does, and few checkpoints are rotated.
            from quantrecipe.loaders.identity import Identity
            from quantrecipe.loaders.stated import with_rotations as as_made

            identity = Identity(reading.layout, None, recipe, None, {})
            contents = as_made(identity, reading.parts, reading.contents)
        else:
            return reading
    except InvalidInput as error:
        result.problems += error.problems
        return reading
    return replace(reading, contents=contents)


def _faults(reading: Reading) -> list[Problem]:
    return [problem for problem in reading.problems if problem.kind not in NOT_READ]


def _not_read(reading: Reading) -> list[Problem]:
    return [problem for problem in reading.problems if problem.kind in NOT_READ]


def _any_coded(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether there are matrices of anything but plain numbers."""
    return any(len(info.shape) >= 2 and not is_plain(info.dtype) for info in tensors.values())


def _reason(verdict: Verdict, result: Examined, method: str | None, *, declared: bool) -> str:
    reading = verdict.best
    wrong = _faults(reading)
    count = len(wrong)
    misfit = f"{count} thing{' in it does' if count == 1 else 's in it do'} not fit"
    if declared:
        how = result.origin.evidence if result.origin is not None else "as --layout says"
        return how if not wrong else f"{how}; {misfit}"
    if wrong:
        return f"no known layout explains it; nearest is {reading.layout.name}, but {misfit}"
    if not reading.quantized:
        return "nothing in it is quantized"
    reason = f"explains its {reading.quantized} quantized modules and every other tensor"
    if reading.claimed:
        return f"{reason}, and its markers or metadata say so"
    if writes_config(reading.layout, method):
        return f"{reason}, and config.json says so (quant_method {method!r})"
    return reason


def _unlike_config(verdict: Verdict, method: str | None, file: str) -> Iterator[Problem]:
    """Tensors that are not as the reader that ``config.json`` names wants them."""
    reading = verdict.best
    if method is None or not reading.quantized or writes_config(reading.layout, method):
        return
    for name in layout_names():
        layout = named_layout(name)
        if not writes_config(layout, method):
            continue
        meant = read_all(layout, reading.parts, named=True)
        wrong = _faults(meant)
        if wrong:
            yield Problem(
                "config-contradicts",
                f"quantization_config is for {method}, and {len(wrong)} thing(s) are not as it "
                f"reads them: {wrong[0].where}: {wrong[0].message}",
                hint=wrong[0].hint or "Take the config that belongs to these weights.",
                file=file,
                pointer="/quantization_config/quant_method",
            )


def _config_of(folder: Location, result: Examined) -> tuple[Mapping[str, Any], Location]:
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


def _note_sidecars(folder: Location, result: Examined) -> None:
    # Beside a single file there may be anything.
    whole = result.survey.root.is_dir()
    for file in sorted(folder.iterdir()):
        known = file.suffix in _SIDECARS if whole else file.name == LOCK_NAME
        if known and file.is_file():
            result.sidecars.setdefault(_below(file, result.survey.folder), "")


def _below(file: Location, folder: Location) -> str:
    try:
        return file.relative_to(folder).as_posix()
    except ValueError:
        return str(file)
