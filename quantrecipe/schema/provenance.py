"""What a checkpoint says it was made by: the recipe in its metadata and the lock beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from quantrecipe.schema.canonical import recipe_digest
from quantrecipe.schema.lock import Lock
from quantrecipe.schema.planning import METADATA_KEY
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recipe import Recipe
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


def target_files(recipe: Recipe) -> dict[str, str]:
    """For each part the file that the recipe writes it to, below the output folder."""
    return {part: recipe.target.file_of(part) for part in recipe.source.parts}


def lock_problems(lock: Lock, folder: Path, file: str) -> Iterator[Problem]:
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
