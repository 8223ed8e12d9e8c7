"""Opening a converted checkpoint: what it says of itself, held against what is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from quantrecipe.checkpoint import open_parts
from quantrecipe.loaders.checkpoint import Checkpoint, OpenPart
from quantrecipe.loaders.identity import identify, root_of
from quantrecipe.loaders.stated import unsaid_rotations, with_rotations
from quantrecipe.schema.canonical import recipe_digest
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import PartContents, read_part
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import LOCK_NAME, Lock, LockedTensor
from quantrecipe.schema.names import NameMapping
from quantrecipe.schema.planning import METADATA_KEY
from quantrecipe.schema.problems import InvalidInput, Problem, closest
from quantrecipe.schema.provenance import embedded_recipe
from quantrecipe.schema.renaming import renamed
from quantrecipe.schema.tensors import SourceFileInfo, SourcePart, TensorInfo

Check = Literal["headers", "digests"]


def open_checkpoint(
    path: Path | str,
    *,
    layout: str | Layout | None = None,
    parts: Mapping[str, str] | None = None,
    names: Sequence[NameMapping] = (),
    check: Check = "headers",
) -> Checkpoint:
    """Open a converted checkpoint, or any checkpoint in a known layout.

    What it is comes from ``recipe.lock.json`` beside it, else from the recipe in its metadata, else
    from ``layout``. Everything that can be seen from headers is checked here.

    Args:
        path: the folder that ``convert`` wrote, or one safetensors file.
        layout: for a checkpoint that does not say what it is; it takes the place of what it says.
        parts: with ``layout``: part name to file, folder or glob; one part by default.
        names: with ``layout``: call modules as a conversion with these entries does.
        check: ``digests``: also hold every tensor that is read against the lock's digest.

    Raises:
        InvalidInput: with every tensor that is missing, extra, misshaped, mistyped or without a
            scale, and everything in which lock, metadata and files differ.
    """
    path = Path(path)
    identity = identify(path, layout, parts)
    if check == "digests" and identity.lock is None:
        raise InvalidInput(
            Problem(
                "no-lock",
                f"there is no {LOCK_NAME} to check digests against"
                if layout is None
                else f"with layout= no {LOCK_NAME} is looked at, so there are no digests to check",
                hint='Open it with check="headers", or keep the lock beside the weights.'
                if layout is None
                else "Leave layout= out: a lock says what its checkpoint is.",
                file=str(path),
            )
        )
    opened = open_parts(path, identity.locations)
    contents = {part.name: renamed(read_part(identity.layout, part), names) for part in opened}
    contents = with_rotations(identity, opened, contents)
    problems = [problem for found in contents.values() for problem in found.problems]
    problems += unsaid_rotations(identity, opened, contents)
    files = {file.path: file for part in opened for file in part.files}
    problems += _unowned(opened, contents)
    if identity.lock is not None:
        problems += _check_lock(identity.lock, root_of(path), files)
        problems += _check_metadata(identity.lock, files.values())
    if problems:
        raise InvalidInput(problems)
    return Checkpoint(
        files=tuple(files.values()),
        layout=identity.layout,
        source_layout=identity.source_layout,
        recipe=identity.recipe,
        lock=identity.lock,
        parts={name: OpenPart(found.modules, found.others) for name, found in contents.items()},
        digests=_digests(identity.lock, root_of(path)) if check == "digests" else {},
    )


def _unowned(
    parts: tuple[SourcePart, ...], contents: Mapping[str, PartContents]
) -> Iterator[Problem]:
    claimed: dict[Location, set[str]] = {}
    files: dict[Location, SourceFileInfo] = {}
    for part in parts:
        for file in part.files:
            files[file.path] = file
            claimed.setdefault(file.path, set()).update(contents[part.name].claimed)
    for path, file in files.items():
        for name in file.tensors:
            if name not in claimed[path]:
                yield Problem("extra-tensor", "it belongs to no part", file=str(path), tensor=name)


def _digests(lock: Lock | None, root: Path) -> dict[tuple[Location, str], str]:
    return {
        (root / tensor.file, tensor.name): tensor.xxh3_128
        for _, tensor in (lock.tensors() if lock is not None else ())
    }


def _check_lock(
    lock: Lock, root: Path, files: Mapping[Location, SourceFileInfo]
) -> Iterator[Problem]:
    """Every tensor that the lock vouches for is there, as it says; and no other."""
    vouched: dict[str, dict[str, LockedTensor]] = {output.path: {} for output in lock.outputs}
    for _, tensor in lock.tensors():
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


def _check_metadata(lock: Lock, files: Iterable[SourceFileInfo]) -> Iterator[Problem]:
    """Every file says that it is of the recipe that the lock is of."""
    for file in files:
        says = embedded_recipe(file.metadata, str(file.path))
        if says is None or recipe_digest(says) != lock.recipe_sha256:
            yield Problem(
                "metadata-mismatch",
                f"its metadata entry {METADATA_KEY!r} "
                + ("is missing" if says is None else "is of another recipe than the lock"),
                hint="File and lock are not of one conversion; convert again.",
                file=str(file.path),
            )
