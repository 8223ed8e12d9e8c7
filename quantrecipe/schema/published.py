"""The published JSON Schemas (2020-12), generated from the models and frozen as files.

``python -m quantrecipe.schema.published --write`` writes them; a published file never changes
afterwards. They accept exactly what the models accept, in the part of the regular-expression
grammar that every validator shares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from quantrecipe.schema.field_docs import field_docs
from quantrecipe.schema.parsed import MAX_INTEGER

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
KINDS: Final = ("recipe", "layout", "names", "lock", "statistics", "evaluation")
FRAGMENTS: Final = ("quantization_config",)
"""What is no document by itself, but a part of other people's."""
SCHEMAS: Final = (*KINDS, *FRAGMENTS)
CURRENT: Final = 1
"""The version of every kind of document that this package writes."""


class _Generator(GenerateJsonSchema):
    """Schemas without what only OpenAPI understands, and with keys held to their patterns."""

    schema_dialect = DIALECT

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        found = super().model_schema(schema)
        found.pop("title", None)
        for name, text in field_docs(schema["cls"]).items():
            found["properties"][name]["description"] = text
        return found

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        found = super().tagged_union_schema(schema)
        found.pop("discriminator", None)
        return found

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        # The default says this with patternProperties, which lets every other key through.
        found: JsonSchemaValue = {"type": "object"}
        keys, values = schema.get("keys_schema"), schema.get("values_schema")
        if keys is not None:
            found["propertyNames"] = self.generate_inner(keys)
        if values is not None:
            found["additionalProperties"] = self.generate_inner(values)
        if "min_length" in schema:
            found["minProperties"] = schema["min_length"]
        if "max_length" in schema:
            found["maxProperties"] = schema["max_length"]
        return found

    def generate(self, schema: CoreSchema, mode: JsonSchemaMode = "validation") -> JsonSchemaValue:
        cleaned = _clean(super().generate(schema, mode))
        assert isinstance(cleaned, dict)
        return cleaned


def _clean(node: Any) -> Any:
    """A schema node, and all in it, as every validator reads it."""
    if isinstance(node, list):
        return [_clean(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    found = {key: _clean_entry(key, value) for key, value in node.items()}
    if "description" in found and isinstance(found["description"], str):
        found["description"] = " ".join(found["description"].split())
    if found.get("default", 0) is None:
        del found["default"]
    if isinstance(found.get("pattern"), str):
        # "$" matches before a final newline in some engines, and look-ahead is missing in others.
        found["not"] = {"pattern": r"\n"}
    if found.get("type") == "integer" and "const" not in found:
        found.setdefault("maximum", MAX_INTEGER)
    return found


def _clean_entry(key: str, value: Any) -> Any:
    if key in ("properties", "$defs") and isinstance(value, dict):
        # These hold schemas under names that are no keywords.
        return {name: _clean(schema) for name, schema in value.items()}
    if key == "default" and isinstance(value, dict):
        return {name: entry for name, entry in value.items() if entry is not None}
    return value if key in ("default", "examples", "const", "enum") else _clean(value)


def schema_id(kind: str) -> str:
    """The URN of a schema; no host is owned, so it resolves to nothing."""
    return f"urn:quantrecipe:schema:v{CURRENT}:{kind}"


def file_name(kind: str) -> str:
    """What the file of a schema is called."""
    return f"{kind}.schema.json"


def generate(kind: str) -> dict[str, Any]:
    """The JSON Schema of a kind of document or fragment, from its model."""
    # Their messages are worded with the help of what is published here.
    from quantrecipe.schema.quantization_config import QuantizationConfig
    from quantrecipe.schema.structure import MODELS

    model = MODELS[kind] if kind in KINDS else QuantizationConfig
    found = model.model_json_schema(schema_generator=_Generator)
    head = {
        "$schema": DIALECT,
        "$id": schema_id(kind),
        "title": f"quantrecipe {kind}, version {CURRENT}",
    }
    definitions = {"$defs": found.pop("$defs")} if "$defs" in found else {}
    return head | found | definitions


def render(schema: Mapping[str, Any]) -> str:
    """The text of a schema file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def published_text(kind: str) -> str:
    """The text of a published schema file, as this package carries it."""
    folder = files("quantrecipe.schema").joinpath(f"v{CURRENT}")
    return folder.joinpath(file_name(kind)).read_text("utf-8")


def main() -> int:
    """Print what differs from the published files, or write them."""
    parser = argparse.ArgumentParser(prog="python -m quantrecipe.schema.published")
    parser.add_argument("--write", action="store_true", help="write the schema files")
    write = parser.parse_args().write
    folder = Path(__file__).parent / f"v{CURRENT}"
    drifted = 0
    for kind in SCHEMAS:
        path, text = folder / file_name(kind), render(generate(kind))
        if path.is_file() and path.read_text("utf-8") == text:
            continue
        drifted += 1
        if write:
            folder.mkdir(exist_ok=True)
            path.write_text(text, "utf-8", newline="\n")
        sys.stdout.write(f"{'wrote' if write else 'differs:'} {path}\n")
    return 0 if write or not drifted else 1


if __name__ == "__main__":
    raise SystemExit(main())
