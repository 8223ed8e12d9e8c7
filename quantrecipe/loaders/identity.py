"""What a checkpoint is: as its lock says, its metadata, or the caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from quantrecipe.checkpoint.containers import read_any_header
from quantrecipe.checkpoint.folder import SUFFIXES, near_miss
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.lock import LOCK_NAME, Lock
from quantrecipe.schema.placement import shard_of
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.provenance import embedded_recipe
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import resolve_layout
from quantrecipe.schema.validation import load_lock


@dataclass(frozen=True, slots=True)
class Identity:
    """What a checkpoint is, as it says or as the caller says.

    Attributes:
        layout: how it is laid out.
        source_layout: how what it was made from was; ``None`` if that is not known.
        recipe: what it was made by, if that is known.
        lock: what vouches for it, if there is one.
        locations: part name to file, folder, index or glob, below the path that was opened.
    """

    layout: Layout
    source_layout: Layout | None
    recipe: Recipe | None
    lock: Lock | None
    locations: Mapping[str, str]


def identify(path: Path, layout: str | Layout | None, parts: Mapping[str, str] | None) -> Identity:
    """What lies at ``path``.

    Raises:
        InvalidInput: nothing does, nothing says what it is, or what does was edited.
    """
    if not path.exists():
        raise InvalidInput(
            Problem(
                "missing-source",
                "there is no such file or folder",
                hint=near_miss(path),
                file=str(path),
            )
        )
    if layout is not None:
        return Identity(resolve_layout(layout), None, None, None, parts or {"model": "."})
    lock_path = root_of(path) / LOCK_NAME
    lock = load_lock(lock_path) if lock_path.is_file() else None
    if lock is not None and (path.is_dir() or path.name in {file.path for file in lock.outputs}):
        if not path.is_dir() and len(lock.outputs) > 1:
            raise _one_of_several(path, path.parent)
        return _from_recipe(lock.recipe, lock, path)
    return _from_recipe(_recipe_of_metadata(path), None, path)


def root_of(path: Path) -> Path:
    """The folder that paths in a lock are below."""
    return path if path.is_dir() else path.parent


def _one_of_several(path: Path, folder: Path) -> InvalidInput:
    return InvalidInput(
        Problem(
            "one-of-several",
            "it is one of several files of a checkpoint",
            hint=f"Open the folder: {folder}",
            file=str(path),
        )
    )


def _from_recipe(recipe: Recipe, lock: Lock | None, path: Path) -> Identity:
    return Identity(
        resolve_layout(recipe.target.layout),
        resolve_layout(recipe.source.layout),
        recipe,
        lock,
        _in_folder(recipe, lock, path) if path.is_dir() else _in_file(recipe, path),
    )


def _in_folder(recipe: Recipe, lock: Lock | None, folder: Path) -> dict[str, str]:
    """Where each part lies: in its own file or the common one, or in the shards of it."""
    found: dict[str, str] = {}
    written = {file.path for file in lock.outputs} if lock is not None else None
    for part in recipe.source.parts:
        file = recipe.target.file_of(part)
        index = f"{file}.index.json"
        whole = (folder / file).is_file() if written is None else file in written
        found[part] = index if not whole and (folder / index).is_file() else file
    return found


def _in_file(recipe: Recipe, path: Path) -> dict[str, str]:
    """The parts that lie in one file: all, or those whose file it is by its name."""
    parts = list(recipe.source.parts)
    segments = path.resolve().parts
    whole = shard_of(path.name)
    if whole is not None and any(
        PurePosixPath(recipe.target.file_of(part)).name == whole for part in parts
    ):
        raise _one_of_several(path, path.parent)
    if len({recipe.target.file_of(part) for part in parts}) == 1:
        return dict.fromkeys(parts, ".")
    for length in (None, 1):
        mine = [part for part in parts if _ends_so(segments, recipe.target.file_of(part), length)]
        if len({recipe.target.file_of(part) for part in mine}) == 1:
            return dict.fromkeys(mine, ".")
    files = ", ".join(f"{part}: {recipe.target.file_of(part)}" for part in parts)
    raise InvalidInput(
        Problem(
            "which-part",
            f"its name does not tell which part of the checkpoint it holds ({files})",
            hint="Open the folder, or give the file the name that it was written under.",
            file=str(path),
        )
    )


def _ends_so(segments: tuple[str, ...], file: str, length: int | None) -> bool:
    wanted = PurePosixPath(file).parts
    wanted = wanted if length is None else wanted[-length:]
    return segments[-len(wanted) :] == wanted


def _recipe_of_metadata(path: Path) -> Recipe:
    candidates = [path]
    if path.is_dir():
        candidates = sorted(each for each in path.rglob("*") if each.name.endswith(SUFFIXES))
    for candidate in candidates:
        recipe = embedded_recipe(read_any_header(candidate).metadata, str(candidate))
        if recipe is not None:
            return recipe
    raise InvalidInput(
        Problem(
            "unknown-checkpoint",
            f"neither {LOCK_NAME} nor the metadata of a file of weights says what it is",
            hint="Say layout=...; quantrecipe inspect tells which.",
            file=str(path),
        )
    )
