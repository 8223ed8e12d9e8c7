"""A layout whose names say which part they are of, for a checkpoint that has only one."""

from __future__ import annotations

import json
from typing import Any, Final

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.validation import parse_layout

ONLY_PART: Final = "model"
"""What the one part of a checkpoint is called where nobody named it."""

_PREFIX: Final = "{part}."


def for_one_part(layout: Layout) -> Layout:
    """The same layout, but that names begin with the module's; called ``-flat`` after it."""
    document = _without_prefix(layout.to_json_value())
    document["name"] = f"{layout.name}-flat"
    return parse_layout(json.dumps(document), f"layout {document['name']}")


def _without_prefix(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_prefix(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_prefix(each) for each in value]
    return value.removeprefix(_PREFIX) if isinstance(value, str) else value
