"""Opening a converted checkpoint: what it says of itself, held against what is there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantrecipe.checkpoint import open_parts
from quantrecipe.loaders.checkpoint import Checkpoint, OpenPart
from quantrecipe.schema.canonical import recipe_digest
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import PartContents, read_part
from quantrecipe.schema.lock import LOCK_NAME, Lock, LockedTensor
from quantrecipe.schema.planning import METADATA_KEY
from quantrecipe.schema.problems import InvalidInput, Problem, closest
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import resolve_layout
from quantrecipe.schema.tensors import SourceFileInfo, SourcePart, TensorInfo
from quantrecipe.schema.validation import load_lock, parse_recipe

Check = Literal["headers", "digests"]


@dataclass(frozen=True, slots=True)
class _Identity:
    """What a checkpoint is, as it says or as the caller says."""

    layout: Layout
    source_layout: Layout | None
    recipe: Recipe | None
    lock: Lock | None
    locations: Mapping[str, str]


def open_checkpoint(
    path: Path | str,
    *,
    layout: str | Layout | None = None,
    parts: Mapping[str, str] | None = None,
    check: Check = "headers",
) -> Checkpoint:
    """Open a converted checkpoint, or any checkpoint in a known layout.

    What it is comes from ``recipe.lock.json`` beside it, else from the recipe in its metadata, else
    from ``layout``. Everything that can be seen from headers is checked here.

    Args:
        path: the folder that ``convert`` wrote, or one safetensors file.
        layout: for a checkpoint that does not say what it is; it takes the place of what it says.
        parts: with ``layout``: part name to file, folder or glob; one part by default.
        check: ``digests``: also hold every tensor that is read against the lock's digest.

    Raises:
        InvalidInput: with every tensor that is missing, extra, misshaped, mistyped or without a
            scale, and everything in which lock, metadata and files differ.
    """
    path = Path(path)
    identity = _identify(path, layout, parts)
    if check == "digests" and identity.lock is None:
        raise InvalidInput(
            Problem(
                "no-lock",
                f"there is no {LOCK_NAME} to check digests against",
                hint='Open it with check="headers", or keep the lock beside the weights.',
                file=str(path),
            )
        )
    opened = open_parts(path, identity.locations)
    contents = {part.name: read_part(identity.layout, part) for part in opened}
    problems = [problem for found in contents.values() for problem in found.problems]
    files = {file.path: file for part in opened for file in part.files}
    problems += _unowned(opened, contents)
    if identity.lock is not None:
        problems += _check_lock(identity.lock, _root(path), files)
    if problems:
        raise InvalidInput(problems)
    return Checkpoint(
        files=tuple(files.values()),
        layout=identity.layout,
        source_layout=identity.source_layout,
        recipe=identity.recipe,
        lock=identity.lock,
        parts={name: OpenPart(found.modules, found.others) for name, found in contents.items()},
        digests=_digests(identity.lock, _root(path)) if check == "digests" else {},
    )


def _identify(
    path: Path, layout: str | Layout | None, parts: Mapping[str, str] | None
) -> _Identity:
    if layout is not None:
        return _Identity(resolve_layout(layout), None, None, None, parts or {"model": "."})
    lock_path = _root(path) / LOCK_NAME
    lock = load_lock(lock_path) if lock_path.is_file() else None
    if lock is not None and (path.is_dir() or path.name in {f.path for f in lock.outputs}):
        if recipe_digest(lock.recipe) != lock.recipe_sha256:
            raise InvalidInput(
                Problem(
                    "recipe-digest",
                    "the lock's recipe is not the one that its digest is of",
                    hint="The lock was edited; convert again.",
                    file=str(lock_path),
                    pointer="/recipe_sha256",
                )
            )
        if not path.is_dir() and len(lock.outputs) > 1:
            raise InvalidInput(
                Problem(
                    "one-of-several",
                    f"it is one of the {len(lock.outputs)} files of a checkpoint",
                    hint=f"Open the folder: {path.parent}",
                    file=str(path),
                )
            )
        return _from_recipe(lock.recipe, lock, path)
    return _from_recipe(_recipe_of_metadata(path), None, path)


def _root(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _from_recipe(recipe: Recipe, lock: Lock | None, path: Path) -> _Identity:
    return _Identity(
        resolve_layout(recipe.target.layout),
        resolve_layout(recipe.source.layout),
        recipe,
        lock,
        _locations(recipe, path),
    )


def _locations(recipe: Recipe, path: Path) -> dict[str, str]:
    """Where each part lies: in its own file or the common one, or in the shards of it."""
    found: dict[str, str] = {}
    target = recipe.target
    for part in recipe.source.parts:
        file = target.parts[part] if target.parts is not None else target.file
        if not path.is_dir():
            found[part] = "."
            continue
        stem = file.removesuffix(".safetensors")
        sharded = (path / f"{file}.index.json").is_file()
        found[part] = f"{stem}-*.safetensors" if sharded else file
    return found


def _recipe_of_metadata(path: Path) -> Recipe:
    candidates = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    for candidate in candidates:
        part = open_parts(candidate, {"model": "."})[0]
        text = part.files[0].metadata.get(METADATA_KEY)
        if text is not None:
            try:
                recipe = json.loads(text)["recipe"]
            except (ValueError, KeyError, TypeError):
                raise InvalidInput(
                    Problem(
                        "bad-metadata",
                        f"its metadata entry {METADATA_KEY!r} holds no recipe",
                        file=str(candidate),
                    )
                ) from None
            return parse_recipe(json.dumps(recipe), f"{candidate} (metadata)")
    raise InvalidInput(
        Problem(
            "unknown-checkpoint",
            f"neither {LOCK_NAME} nor the metadata of a safetensors file says what it is",
            hint="Say layout=...; quantrecipe inspect tells which.",
            file=str(path),
        )
    )


def _unowned(
    parts: tuple[SourcePart, ...], contents: Mapping[str, PartContents]
) -> Iterator[Problem]:
    claimed: dict[Path, set[str]] = {}
    files: dict[Path, SourceFileInfo] = {}
    for part in parts:
        for file in part.files:
            files[file.path] = file
            claimed.setdefault(file.path, set()).update(contents[part.name].claimed)
    for path, file in files.items():
        for name in file.tensors:
            if name not in claimed[path]:
                yield Problem(
                    "extra-tensor", "it belongs to no part", file=str(path), tensor=name
                )


def _digests(lock: Lock | None, root: Path) -> dict[tuple[Path, str], str]:
    return {
        (root / tensor.file, tensor.name): tensor.sha256
        for tensor in (_vouched(lock) if lock is not None else ())
    }


def _vouched(lock: Lock) -> Iterator[LockedTensor]:
    for module in lock.modules:
        yield from module.tensors.values()
    for other in lock.others:
        yield other.tensor


def _check_lock(
    lock: Lock, root: Path, files: Mapping[Path, SourceFileInfo]
) -> Iterator[Problem]:
    """Every tensor that the lock vouches for is there, as it says; and no other."""
    vouched: dict[str, dict[str, LockedTensor]] = {output.path: {} for output in lock.outputs}
    for tensor in _vouched(lock):
        vouched.setdefault(tensor.file, {})[tensor.name] = tensor
    for relative, tensors in vouched.items():
        file = files.get(root / relative)
        if file is None:
            yield Problem("missing-file", "the lock vouches for it", file=str(root / relative))
            continue
        for name, tensor in tensors.items():
            yield from _check_tensor(file, name, tensor, file.tensors.get(name))
        for name in file.tensors:
            if name not in tensors:
                yield Problem(
                    "extra-tensor",
                    "the lock does not know it",
                    file=str(file.path),
                    tensor=name,
                )


def _check_tensor(
    file: SourceFileInfo, name: str, tensor: LockedTensor, info: TensorInfo | None
) -> Iterator[Problem]:
    def differs(kind: str, message: str, hint: str | None = None) -> Problem:
        return Problem(kind, message, hint=hint, file=str(file.path), tensor=name)

    if info is None:
        near = closest(name, file.tensors)
        hint = f"There is {near!r}." if near is not None else None
        yield differs("missing-tensor", "the lock vouches for it", hint)
    elif info.dtype != tensor.dtype:
        yield differs("mistyped-tensor", f"is {info.dtype}, not {tensor.dtype}")
    elif info.shape != tensor.shape:
        yield differs("misshaped-tensor", f"is {list(info.shape)}, not {list(tensor.shape)}")
    elif info.offset != tensor.offset:
        yield differs("misplaced-tensor", f"begins at byte {info.offset}, not {tensor.offset}")
