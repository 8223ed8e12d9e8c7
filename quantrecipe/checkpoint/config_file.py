"""Reading a ``config.json`` that nobody vouches for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from quantrecipe.checkpoint.errors import SourceError
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import InvalidInput, Problem

_LARGEST: Final = 16 << 20


def read_config(path: Location) -> Mapping[str, Any]:
    """The object in a ``config.json``.

    Raises:
        InvalidInput: it is too large, no JSON, or no object.
        SourceError: it cannot be read.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise _bad(path, "is too large for a config")
        text = path.read_bytes()
    except OSError as error:
        raise SourceError(path, error) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _bad(path, "is not a JSON object")
    return value


def _bad(path: Location, message: str) -> InvalidInput:
    return InvalidInput(Problem("bad-sidecar", message, file=str(path)))
