"""What a checkpoint says it was made by: the recipe in its metadata and the lock beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Final

from quantrecipe.schema.canonical import recipe_digest
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import PartContents, StoredModule
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import Lock
from quantrecipe.schema.plan_metadata import METADATA_KEY
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.quantization_config import (
    CONFIG_KEY,
    CONFIG_NAME,
    configured_modules,
    parse_quantization_config,
)
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.schemes import Hadamard, ScaledWeight, Scheme
from quantrecipe.schema.selection import select
from quantrecipe.schema.tensors import SourcePart
from quantrecipe.schema.validation import parse_recipe


def embedded_recipe(metadata: Mapping[str, str], file: str) -> Recipe | None:
    """The recipe in the metadata of a safetensors file; ``None`` if there is none.

    Raises:
        InvalidInput: there is something else, or its digest is not that of the recipe.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        document = json.loads(text)
        value, digest = document["recipe"], document["recipe_sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InvalidInput(
            Problem(
                "bad-recipe-metadata",
                f"the metadata key {METADATA_KEY!r} holds no recipe with its digest",
                hint="The entry was edited, or belongs to another tool.",
                file=file,
            )
        ) from None
    recipe = parse_recipe(json.dumps(value), f"{file} (metadata)")
    if recipe_digest(recipe) != digest:
        raise InvalidInput(
            Problem(
                "bad-recipe-metadata",
                "the recipe in the metadata is not the one that its digest is of",
                hint="The entry was edited; convert again.",
                file=file,
            )
        )
    return recipe


_UNREAD: Final = ("use_hadamard", "use_svd", "use_codebook")
"""Settings of SDNQ that change what codes stand for."""


def schemes_of(
    recipe: Recipe, modules: Mapping[str, Mapping[str, StoredModule]]
) -> dict[tuple[str, str], Scheme]:
    """The scheme that the rules of a recipe give each quantized module, by part and name.

    Args:
        recipe: what the checkpoint was made by.
        modules: of every part, by name.
    """
    contents = {part: PartContents(found, {}, frozenset(), ()) for part, found in modules.items()}
    schemes: dict[tuple[str, str], Scheme] = {}
    for (part, name), taken in select(recipe, contents).taken.items():
        if taken.rule is None:
            continue
        scheme = recipe.schemes[taken.rule.scheme]
        weight = modules[part][name].weight
        if isinstance(scheme.weight, ScaledWeight) and scheme.weight.format == weight.format:
            schemes[part, name] = scheme
    return schemes


def configured_rotations(layout: Layout, part: SourcePart) -> dict[str, Hadamard]:
    """What the ``config.json`` beside a part says of rotated modules, by their names.

    Args:
        layout: of the part; one without a ``config`` says nothing there.
        part: the part.

    Raises:
        InvalidInput: its ``quantization_config`` is broken, or says of modules what is not read.
    """
    file = part.root / CONFIG_NAME
    if layout.config is None or not file.is_file():
        return {}
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return {}
    found = document.get(CONFIG_KEY) if isinstance(document, dict) else None
    if not isinstance(found, dict):
        return {}
    if found.get("quant_method") == "sdnq":
        _check_sdnq(found, file)
    if found.get("quant_method") != "quantrecipe":
        return {}
    modules = configured_modules(parse_quantization_config(found))
    return {name: each.rotation for name, each in modules.items() if each.rotation is not None}


def _check_sdnq(settings: Mapping[str, object], file: Location) -> None:
    """Codes of SDNQ that are rotated, or a part of what they stand for: no tensor shows it."""
    unread = [key for key in _UNREAD if settings.get(key)]
    if unread:
        raise InvalidInput(
            Problem(
                "unread-settings",
                f"its quantization_config says {' and '.join(unread)}, which are not read",
                hint="Quantize with SDNQ without them, or convert from the plain weights.",
                file=str(file),
                pointer=f"/{CONFIG_KEY}/{unread[0]}",
            )
        )


def with_rotations(layout: Layout, part: SourcePart, contents: PartContents) -> PartContents:
    """A part whose modules say how they are rotated, as the ``config.json`` beside it does.

    Raises:
        InvalidInput: its ``quantization_config`` is broken.
    """
    said = configured_rotations(layout, part)
    modules = {
        name: replace(module, rotation=said[name]) if name in said else module
        for name, module in contents.modules.items()
    }
    return replace(contents, modules=modules)


def rotated_source(part: SourcePart, contents: PartContents) -> Iterator[Problem]:
    """A part that is stored rotated, as its metadata says, and nothing says which modules are."""
    if any(module.rotation is not None for module in contents.modules.values()):
        return
    for file in part.files:
        with suppress(InvalidInput):  # what says nothing of a recipe says nothing of rotations
            recipe = embedded_recipe(file.metadata, str(file.path))
            if recipe is None or not any(each.rotation for each in recipe.schemes.values()):
                continue
            # Its stored numbers mean something only together with what rotates activations.
            yield Problem(
                "rotated-source",
                f"part {part.name!r} of the source is stored rotated, and nothing beside it says "
                "which modules are",
                hint="Get its config.json, or convert from the checkpoint that it was made from.",
                file=str(file.path),
                pointer="/source",
            )


def target_files(recipe: Recipe) -> dict[str, str]:
    """For each part the file that the recipe writes it to, below the output folder."""
    return {part: recipe.target.file_of(part) for part in recipe.source.parts}


def written_paths(lock: bytes) -> tuple[str, ...]:
    """The files that a lock says were written, itself aside; none, if this is no lock at all."""
    try:
        document = json.loads(lock)
        return tuple(str(entry["path"]) for entry in document["outputs"] + document["sidecars"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()


def lock_problems(lock: Lock, folder: Location, file: str) -> Iterator[Problem]:
    """Files that the lock vouches for and that are gone, or of another size."""
    for output in lock.outputs:
        path = folder / output.path
        if not path.is_file():
            yield Problem(
                "missing-output",
                f"{output.path} was written, and is not there",
                hint="Get it from where the others came from, or convert again.",
                file=file,
            )
        elif path.stat().st_size != output.bytes:
            yield Problem(
                "lock-mismatch",
                f"{output.path} has {path.stat().st_size:,} bytes, and was written with "
                f"{output.bytes:,}",
                hint="The file is not the one that the lock vouches for.",
                file=file,
            )
