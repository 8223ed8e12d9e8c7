"""What the safetensors metadata of an output file says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from quantrecipe.schema.canonical import canonical_bytes
from quantrecipe.schema.gguf import is_container_key
from quantrecipe.schema.json_text import parse_json
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.markers import COMFYUI_KEY
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.tensors import SourceFileInfo, SourcePart

TORCHAO_KEY: Final = "tensor_names"
"""Where torchao lists the names of all tensors; each of them is a key as well."""

METADATA_KEY: Final = "quantrecipe"
"""The one key of the safetensors metadata under which a file explains itself."""


def recipe_metadata(recipe: Recipe, recipe_sha256: str) -> dict[str, str]:
    """The metadata entry that says what a file is, without its sidecars."""
    document = {"recipe": recipe.to_json_value(), "recipe_sha256": recipe_sha256, "version": 1}
    return {METADATA_KEY: canonical_bytes(document).decode()}


def carried_over(parts: Sequence[SourcePart], source_layout: Layout) -> dict[str, str]:
    """The source's own entries, for the file that these parts go into.

    What all parts say alike keeps its key; where parts differ, ``part.`` goes before it. Entries
    that belong to the source's layout or to a conversion before this one are not carried over: they
    would claim of the output what is true of the source only.
    """
    said = {part.name: dict(_entries(part, source_layout)) for part in parts}
    found: dict[str, str] = {}
    for name, entries in said.items():
        for key, value in entries.items():
            alike = all(other.get(key, value) == value for other in said.values())
            found[key if alike else f"{name}.{key}"] = value
    return found


def conflicts(part: SourcePart) -> Iterator[Problem]:
    """Entries that the files of one part disagree about: the first file's are carried over."""
    first: dict[str, str] = {}
    for file in part.files:
        for key, value in sorted(file.metadata.items()):
            if first.setdefault(key, value) != value and key != METADATA_KEY:
                yield Problem(
                    "metadata-conflict",
                    f"its metadata says otherwise about {key!r} than the first file of part "
                    f"{part.name!r} with that key, whose entry is carried over",
                    file=str(file.path),
                )


def _entries(part: SourcePart, source_layout: Layout) -> Iterator[tuple[str, str]]:
    seen = {METADATA_KEY}
    for file in part.files:
        of_modules = _of_modules(source_layout, file)
        for key, value in sorted(file.metadata.items()):
            own = source_layout.metadata.get(key) == value or key in of_modules
            if key not in seen and not own and not is_container_key(key):
                yield key, value
            seen.add(key)


def _of_modules(layout: Layout, file: SourceFileInfo) -> frozenset[str]:
    """Keys whose entries say how the source stores its modules."""
    if layout.module_metadata == "comfyui":
        return frozenset({COMFYUI_KEY})
    if layout.module_metadata == "torchao":
        read = parse_json(file.metadata.get(TORCHAO_KEY, "[]"))
        names = read.value if isinstance(read.value, list) else []
        return frozenset({TORCHAO_KEY, *(name for name in names if isinstance(name, str))})
    return frozenset()
