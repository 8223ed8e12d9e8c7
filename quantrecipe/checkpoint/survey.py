"""Opening a checkpoint that nobody has described: what files there are, and what keeps them shut.

Where opening a source stops at the first thing that is wrong, a survey goes on with what is left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantrecipe.checkpoint.containers import read_any_header
from quantrecipe.checkpoint.errors import SourceError, some
from quantrecipe.checkpoint.folder import (
    GGUF_SUFFIX,
    INDEX_SUFFIX,
    SUFFIX,
    SUFFIXES,
    Found,
    look_into,
)
from quantrecipe.checkpoint.source import open_parts
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.tensors import SourceFileInfo, SourcePart, TensorInfo

_SHARD: Final = re.compile(r"^(.*)-([0-9]{5})-of-([0-9]{5})\.safetensors$")


@dataclass(frozen=True, slots=True)
class Piece:
    """Files that belong together.

    Attributes:
        location: where they lie below the root, as ``source.parts`` says it.
        parts: one, unless the caller named several parts in the same files.
    """

    location: str
    parts: tuple[SourcePart, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found.

    Attributes:
        root: what locations are relative to: a folder, or a single file (at ``.``).
        pieces: in the order of their locations, or as named.
        problems: what is wrong with files, headers and indexes.
        notes: what is worth knowing and no fault.
    """

    root: Location
    pieces: tuple[Piece, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def folder(self) -> Location:
        """The folder that the root is, or lies in."""
        return self.root if self.root.is_dir() else self.root.parent

    @property
    def files(self) -> tuple[SourceFileInfo, ...]:
        """Every file, once."""
        found = {
            file.path: file for piece in self.pieces for part in piece.parts for file in part.files
        }
        return tuple(found.values())


def survey(path: Location, parts: Mapping[str, str] | None = None) -> Survey:
    """Find and open what is at a path.

    Args:
        path: a safetensors or GGUF file, an index, a folder with either, or one of such folders,
            here or in a repository.
        parts: part name to location below ``path``, where the caller knows them.

    Raises:
        InvalidInput: nothing there can be opened; every reason is in it.
        SourceError: something is there and cannot be read.
        HubError: a repository cannot be read.
    """
    try:
        if path.is_file() and path.name.endswith(INDEX_SUFFIX):
            path, location = path.parent, path.name
            return _open(path, parts or {"model": location}, [], [])
        if parts is not None:
            return _open(path, parts, [], [])
        if not path.is_dir():
            return _open(path, {"model": "."}, [], _of_a_shard(path))
        return _survey_folder(path)
    except OSError as error:
        raise SourceError(Path(error.filename) if error.filename else path, error) from error


def _survey_folder(root: Location) -> Survey:
    found = look_into(root)
    problems: list[Problem] = []
    notes: list[str] = []
    locations = _locations(root, found, "", problems, notes)
    if locations and found.parts:
        notes.append(
            f"{some(f'{part}/' for part in found.parts)} below it hold safetensors too: inspect "
            "them by themselves, or name them with --part"
        )
    if not locations:
        for part in found.parts:
            inner = look_into(root / part)
            locations |= _locations(root / part, inner, f"{part}/", problems, notes)
    return _open(root, _by_name(locations) or {"model": "."}, problems, notes)


def _locations(
    folder: Location, found: Found, prefix: str, problems: list[Problem], notes: list[str]
) -> dict[str, str]:
    """Location to what its part may be called, for the weights right in a folder."""
    whole = prefix.rstrip("/") or "."
    name = prefix.rstrip("/") or "model"
    shards = [match for file in found.files if (match := _SHARD.match(file)) is not None]
    if not found.indexes and len(shards) == len(found.files) > 0 and int(shards[0][3]) > 1:
        problems.append(_without_index(folder, shards))
        return {f"{prefix}*{SUFFIX}": name}
    if len(found.indexes) == 1 or (not found.indexes and len(found.files) == 1):
        _note_unlisted(folder, found, prefix, notes)
        return {whole: name}
    several = found.indexes or found.files
    if several:
        notes.append(
            f"{folder.name or folder}/ holds {len(several)} "
            f"{'indexes' if found.indexes else 'files'} that do not say how they belong together: "
            "each is taken for a part"
        )
    return {f"{prefix}{file}": _stem(prefix + file) for file in several}


def _note_unlisted(folder: Location, found: Found, prefix: str, notes: list[str]) -> None:
    if not found.indexes:
        return
    stem = found.indexes[0].removesuffix(INDEX_SUFFIX)
    beside = [
        prefix + file
        for file in found.files
        if not ((shard := _SHARD.match(file)) and shard[1] == stem)
    ]
    if beside:
        notes.append(f"not looked at, as the index of {folder.name}/ is: {some(beside)}")


def _without_index(folder: Location, shards: Sequence[re.Match[str]]) -> Problem:
    total = max(int(shard[3]) for shard in shards)
    missing = sorted(set(range(1, total + 1)) - {int(shard[2]) for shard in shards})
    gone = f"; of {total} in all, number {some(map(str, missing))} is not there"
    return Problem(
        "missing-index",
        f"the folder holds {len(shards)} shard(s) and no index{gone if missing else ''}",
        hint=f"Fetch the {shards[0][1]}{INDEX_SUFFIX} that belongs to them"
        + (" and the missing shards." if missing else "."),
        file=str(folder),
    )


def _of_a_shard(path: Location) -> list[str]:
    shard = _SHARD.match(path.name)
    if shard is None:
        return []
    return [f"this is shard {int(shard[2])} of {int(shard[3])}: for the whole, inspect its folder"]


def _by_name(locations: Mapping[str, str]) -> dict[str, str]:
    """Part name to location; names made fit for a recipe, and told apart."""
    named: dict[str, str] = {}
    for location, wanted in locations.items():
        slug = re.sub(r"[^a-z0-9_]+", "_", wanted.lower())[:60].strip("_") or "part"
        slug = slug if slug[0].isalpha() else f"part_{slug}"
        name, number = slug, 2
        while name in named:
            name, number = f"{slug}_{number}", number + 1
        named[name] = location
    return named


def _stem(file: str) -> str:
    return file.removesuffix(INDEX_SUFFIX).removesuffix(SUFFIX).removesuffix(GGUF_SUFFIX)


def _open(
    root: Location, parts: Mapping[str, str], problems: list[Problem], notes: list[str]
) -> Survey:
    opened: list[tuple[str, SourcePart]] = []
    for name, location in parts.items():
        try:
            opened.append((location, open_parts(root, {name: location})[0]))
        except InvalidInput as error:
            problems += error.problems
            salvaged = _salvage(root, name, location, problems)
            if salvaged is not None:
                opened.append((location, salvaged))
    if not opened:
        raise InvalidInput(dict.fromkeys(problems))
    pieces: dict[tuple[Location, ...], Piece] = {}
    for location, part in opened:
        key = tuple(file.path for file in part.files)
        before = pieces.get(key, Piece(location, ()))
        pieces[key] = Piece(before.location, (*before.parts, part))
    return Survey(root, tuple(pieces.values()), tuple(dict.fromkeys(problems)), tuple(notes))


def _salvage(
    root: Location, name: str, location: str, problems: list[Problem]
) -> SourcePart | None:
    """What can be opened of a part that cannot be opened as a whole."""
    place = root if location == "." else root / location
    if any(problem.kind in ("outside-source", "not-a-folder") for problem in problems):
        return None
    if place.name.endswith(INDEX_SUFFIX):
        place = place.parent
    if place.is_dir():
        paths = sorted(path for path in place.iterdir() if path.name.endswith(SUFFIXES))
    else:
        paths = sorted(root.glob(location)) if "*" in location else []
    files: list[SourceFileInfo] = []
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        try:
            file = read_any_header(path, path.relative_to(root).as_posix())
        except InvalidInput as error:
            problems += error.problems
            continue
        files.append(file)
        tensors = {**file.tensors, **tensors}
    if not files:
        return None
    return SourcePart(name, files[0].path.parent, tuple(files), tensors)
