"""What a published schema allows at a place of a document: for suggestions, never for verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, Final

Schema = Mapping[str, Any]

# The fields that unions are told apart by.
_TAGS: Final = ("kind", "format", "granularity")

_TYPES: Final[Mapping[str, tuple[type, ...]]] = MappingProxyType(
    {
        "object": (dict,),
        "array": (list,),
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "null": (type(None),),
    }
)


def known_fields(kind: str, value: Any, tokens: Sequence[str | int]) -> list[str]:
    """The fields that the object at ``tokens`` may have, as far as its tags say which it is."""
    root = _schema(kind)
    fields: set[str] = set()
    for schema, found in _at(root, value, tokens):
        if _fits(schema, found):
            fields.update(schema.get("properties", {}))
    return sorted(fields)


def known_types(kind: str, value: Any, tokens: Sequence[str | int]) -> list[str]:
    """The JSON types that the value at ``tokens`` may have, in the order of the schema."""
    types = [schema["type"] for schema, _ in _at(_schema(kind), value, tokens) if "type" in schema]
    return list(dict.fromkeys(types))


@cache
def _schema(kind: str) -> Schema:
    # The generator comes along with the text, and only what is wrong needs suggestions.
    from quantrecipe.schema.published import published_text

    loaded: Schema = json.loads(published_text(kind))
    return loaded


def _at(root: Schema, value: Any, tokens: Sequence[str | int]) -> list[tuple[Schema, Any]]:
    """Every branch of the schema that speaks of the value at ``tokens``."""
    branches = list(_branches(root, root))
    for token in tokens:
        inner = [
            step for schema in branches if _fits(schema, value) for step in _step(schema, token)
        ]
        branches = [branch for step in inner for branch in _branches(root, step)]
        value = value[token]
    return [(schema, value) for schema in branches]


def _branches(root: Schema, schema: Schema) -> Iterator[Schema]:
    """A schema without references and alternatives: one for each thing it may be."""
    if "$ref" in schema:
        yield from _branches(root, root["$defs"][schema["$ref"].rpartition("/")[2]])
    for word in ("anyOf", "oneOf"):
        for branch in schema.get(word, ()):
            yield from _branches(root, branch)
    if "type" in schema:
        yield schema


def _step(schema: Schema, token: str | int) -> Iterator[Schema]:
    """What the schema says of one entry."""
    if isinstance(token, int):
        first = schema.get("prefixItems", ())
        if token < len(first):
            yield first[token]
        elif "items" in schema:
            yield schema["items"]
    elif token in schema.get("properties", {}):
        yield schema["properties"][token]
    elif isinstance(schema.get("additionalProperties"), dict):
        yield schema["additionalProperties"]


def _fits(schema: Schema, value: Any) -> bool:
    """Whether the value has the type of the branch, and none of its tags says otherwise."""
    if not isinstance(value, _TYPES[schema["type"]]):
        return False
    if not isinstance(value, dict):
        return True
    for name in _TAGS:
        tag = schema.get("properties", {}).get(name, {})
        allowed = [tag["const"]] if "const" in tag else tag.get("enum")
        if allowed and isinstance(value.get(name), str) and value[name] not in allowed:
            return False
    return True
