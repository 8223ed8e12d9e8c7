"""Where a checkpoint comes from: the lock beside it, the recipe in its metadata, and its parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantrecipe.checkpoint.folder import INDEX_SUFFIX, SUFFIX
from quantrecipe.checkpoint.survey import Survey
from quantrecipe.schema.canonical import recipe_digest
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import LOCK_NAME
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.provenance import embedded_recipe, lock_problems, target_files
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.validation import load_lock


@dataclass(frozen=True, slots=True)
class Origin:
    """What a checkpoint says it was made by.

    Attributes:
        recipe: the recipe.
        evidence: where that was read.
        locations: where its parts lie, as far as they were found.
    """

    recipe: Recipe
    evidence: str
    locations: Mapping[str, str]


def origin_of(found: Survey, problems: list[Problem]) -> Origin | None:
    """What the lock or the metadata says; what does not hold about either goes to ``problems``."""
    embedded = None
    for file in found.files:
        try:
            embedded = embedded_recipe(file.metadata, str(file.path))
        except InvalidInput as error:
            problems += error.problems
        if embedded is not None:
            break
    locked = _locked_recipe(found, problems)
    recipe = locked or embedded
    if recipe is None:
        return None
    if locked and embedded and recipe_digest(locked) != recipe_digest(embedded):
        problems.append(
            Problem(
                "lock-disagrees",
                f"it holds the recipe {locked.name!r}, and the metadata of the weights another "
                f"one, {embedded.name!r}",
                hint="Lock and weights are of different conversions: take both from the same one.",
                file=str(found.folder / LOCK_NAME),
            )
        )
        recipe = embedded
    where = LOCK_NAME if recipe is locked else "its metadata"
    evidence = f"{where} holds the recipe {recipe.name!r} that it was made by"
    return Origin(recipe, evidence, _own_locations(recipe, found, problems))


def _locked_recipe(found: Survey, problems: list[Problem]) -> Recipe | None:
    path = found.folder / LOCK_NAME
    if not path.is_file():
        return None
    try:
        lock = load_lock(path)
    except InvalidInput as error:
        problems += error.problems
        return None
    if found.root.is_file() and found.root.name not in {output.path for output in lock.outputs}:
        return None
    problems += lock_problems(lock, found.folder, str(path))
    return lock.recipe


def _own_locations(recipe: Recipe, found: Survey, problems: list[Problem]) -> dict[str, str]:
    files = target_files(recipe)
    located = {part: _locate(found.root, file) for part, file in files.items()}
    here = {part: where for part, where in located.items() if where is not None}
    if not here and len(found.pieces) == 1:
        (piece,) = found.pieces
        return dict.fromkeys(_written_to(files, piece.parts[0].files[0].path), piece.location)
    for part in files.keys() - here.keys() if here else ():
        problems.append(
            Problem(
                "missing-part",
                f"part {part!r} of the recipe was written to {files[part]!r}, and is not there",
                hint="Get it from where the others came from, or convert again.",
                file=str(found.root),
            )
        )
    return here


def _written_to(files: Mapping[str, str], path: Location) -> list[str]:
    """The parts that a file outside its output folder holds; none where that cannot be told."""
    if len(set(files.values())) == 1:
        return list(files)
    whole = path.resolve().as_posix() if isinstance(path, Path) else str(path)
    by_path = [part for part, file in files.items() if _is_file_or_shard(whole, file)]
    by_name = [
        part for part, file in files.items() if _is_file_or_shard(whole, file.rpartition("/")[2])
    ]
    for parts in (by_path, by_name):
        if len({files[part] for part in parts}) == 1:
            return parts
    return []


def _is_file_or_shard(path: str, written: str) -> bool:
    if path.endswith(f"/{written}"):
        return True
    stem = re.escape("/" + written.removesuffix(SUFFIX))
    return re.search(rf"{stem}(-[0-9]{{5}}-of-[0-9]{{5}})?{re.escape(SUFFIX)}$", path) is not None


def _locate(root: Location, file: str) -> str | None:
    if root.is_file():
        return None
    index = f"{file.removesuffix(SUFFIX)}{INDEX_SUFFIX}"
    return next((name for name in (file, index) if (root / name).is_file()), None)
