"""The canonical form of a document (RFC 8785) and its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import rfc8785

from quantrecipe.schema.recipe import Recipe


def canonical_bytes(value: Any) -> bytes:
    """A JSON value as RFC 8785 writes it: sorted keys, no spaces, numbers as ECMAScript has them.

    Raises:
        ValueError: the value is not JSON: NaN, an integer beyond 2^53 - 1, a lone surrogate, a key
            that is no string, an object of another type.
    """
    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        raise ValueError(f"no canonical JSON: {error}") from error


def digest(value: Any) -> str:
    """Lower-case hex SHA-256 of the canonical form.

    Raises:
        ValueError: as for ``canonical_bytes``.
    """
    return hashlib.sha256(canonical_bytes(value)).hexdigest()


def recipe_digest(recipe: Recipe) -> str:
    """The digest that locks and file metadata carry: of the recipe as it was written.

    Fields that were left out stay out, so that anyone can compute it from the file alone.
    """
    return digest(recipe.to_json_value())


def lock_digest(lock: Mapping[str, Any]) -> str:
    """What ``sha256`` of a lock has to be: the digest of all that it says beside that field.

    Args:
        lock: a lock as a JSON value, with the field or without it.

    Raises:
        ValueError: as for ``canonical_bytes``.
    """
    return digest({field: value for field, value in lock.items() if field != "sha256"})


def document_bytes(value: object) -> bytes:
    """A document as it is written for people: indented, with a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
