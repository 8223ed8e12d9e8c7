"""Markers: small JSON objects, in tensors or in the metadata of a file, about how modules lie.

A layout has a template of what is said. Values that begin with ``$`` stand for numbers, which are
filled in when a marker is written and taken out of it when it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from quantrecipe.schema.json_text import parse_json
from quantrecipe.schema.layout import MarkerTemplate
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.schemes import Hadamard
from quantrecipe.schema.tensors import SourcePart, TensorInfo

COMFYUI_KEY: Final = "_quantization_metadata"
OFFSET: Final = "$offset"
VARIABLES: Final = frozenset({"$out", "$in", "$rotation", "$dtype", OFFSET})
"""What stands for numbers and names in a template."""

_Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Marked:
    """What a marker says of its module.

    Attributes:
        shape: out and in features, if it says them.
        rotation: how its weight is rotated.
        offset: what is added to scales that are stored less their mean.
        two_levels: whether its scales have two levels; ``None``: it does not say.
        problem: why it is not a marker of the layout; then nothing else is known.
    """

    shape: tuple[int, int] | None = None
    rotation: Hadamard | None = None
    offset: float | None = None
    two_levels: bool | None = None
    problem: str | None = None


def read_marker(
    template: MarkerTemplate, info: TensorInfo | None, said: Mapping[str, object] | None
) -> Marked:
    """What a marker says, or the metadata of its file in its place.

    Args:
        template: what it should say.
        info: the tensor, with its content, if there is one.
        said: what the metadata of the file say of the same module, if they do.
    """
    found: _Object | None = said
    if info is not None:
        content = parsed(info.content)
        if isinstance(content, str):
            return Marked(problem=content)
        if said is not None and dict(said) != dict(content):
            return Marked(
                problem=f"it says {_short(content)}, and the metadata of the file {_short(said)}"
            )
        found = content
    assert found is not None
    found = _flat(found)
    values: dict[str, Any] = {}
    differs = _differs(template.json_object, found, values)
    if differs is not None:
        return Marked(problem=f"it says {_short(found)}: {differs}")
    rotated = template.rotated is not None and _literals_in(template.rotated, found)
    two_levels = template.two_levels is not None and _literals_in(template.two_levels, found)
    for extra, present in ((template.rotated, rotated), (template.two_levels, two_levels)):
        differs = _differs(extra, found, values) if extra is not None and present else None
        if differs is not None:
            return Marked(problem=f"it says {_short(found)}: {differs}")
    return _taken(values, found, two_levels if template.two_levels is not None else None)


def _taken(values: Mapping[str, Any], found: _Object, two_levels: bool | None) -> Marked:
    shape = rotation = offset = None
    if "$out" in values:
        shape = values["$out"], values["$in"]
        if not all(type(size) is int and size > 0 for size in shape):
            return Marked(problem=f"it says {_short(found)}: no shape of a weight")
    if "$rotation" in values:
        try:
            rotation = Hadamard.model_validate({"kind": "hadamard", "size": values["$rotation"]})
        except ValidationError:
            size = values["$rotation"]
            return Marked(problem=f"it says {_short(found)}: {size!r} is no size of a rotation")
    if OFFSET in values:
        offset = values[OFFSET]
        if isinstance(offset, bool) or not isinstance(offset, int | float):
            return Marked(problem=f"it says {_short(found)}: {offset!r} is no number")
        if not math.isfinite(offset):
            return Marked(problem=f"it says {_short(found)}: an offset has to be finite")
        offset = float(offset)
    return Marked(shape, rotation, offset, two_levels)


def parsed(content: bytes | None) -> _Object | str:
    """The object that a marker holds, or why it holds none."""
    if content is None:
        return "it is no JSON object of at most 1024 bytes"
    read = parse_json(content.rstrip(b" \0"))
    if read.problems:
        return f"it is no JSON: {read.problems[0].message}"
    return read.value if isinstance(read.value, dict) else "it is no JSON object"


def written_marker(
    template: MarkerTemplate,
    shape: tuple[int, int],
    *,
    rotation: Hadamard | None,
    two_levels: bool,
    dtype: str,
) -> dict[str, Any]:
    """What is written about a module; ``$offset`` stays in it, since only the end tells it.

    Args:
        template: what to say.
        shape: out and in features.
        rotation: how its weight is rotated.
        two_levels: whether its scales have two levels.
        dtype: what the weight is decoded to.
    """
    said = dict(template.json_object)
    if rotation is not None and template.rotated is not None:
        said |= template.rotated
    if two_levels and template.two_levels is not None:
        said |= template.two_levels
    values = {"$out": shape[0], "$in": shape[1], "$dtype": dtype}
    values["$rotation"] = 0 if rotation is None else rotation.size
    filled = _filled(said, values)
    assert isinstance(filled, dict)
    return filled


def marker_bytes(said: Mapping[str, Any], length: int | None, offset: float | None = None) -> bytes:
    """The bytes of a marker.

    Args:
        said: what ``written_marker`` gave.
        length: with blanks up to this many bytes; ``None``: as many as it needs.
        offset: what ``$offset`` stands for.
    """
    if offset is not None:
        said = _filled(said, {OFFSET: offset})
    text = json.dumps(said, ensure_ascii=False).encode()
    return text if length is None else text.ljust(length)


def file_markers(
    key: str, part: SourcePart
) -> tuple[Mapping[str, Mapping[str, object]], list[Problem]]:
    """What the metadata of a part's files say of its modules, by name, and what is wrong there."""
    found: dict[str, Mapping[str, object]] = {}
    problems: list[Problem] = []
    if key != "comfyui":
        return found, problems
    for file in part.files:
        text = file.metadata.get(COMFYUI_KEY)
        if text is None:
            continue
        layers = _layers(text)
        if layers is None:
            problems.append(
                Problem(
                    "bad-metadata",
                    f"the metadata entry {COMFYUI_KEY!r} has no object 'layers' of objects",
                    hint="Write the file again, or take the entry out.",
                    file=str(file.path),
                )
            )
            continue
        found |= layers
    return found, problems


def weight_class(part: SourcePart, name: str) -> str | None:
    """The class that torchao gives a weight in the metadata of a part's files, if it is told there.

    Args:
        part: the part.
        name: of the weight, as the model calls it.
    """
    for file in part.files:
        read = parse_json(file.metadata.get(name, "{}"))
        said = read.value.get("_type") if isinstance(read.value, dict) else None
        if isinstance(said, str) and not read.problems:
            return said
    return None


def comfyui_metadata(markers: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """The metadata entry that repeats every marker of a file."""
    layers = dict(sorted(markers))
    return json.dumps({"format_version": "1.0", "layers": layers}, ensure_ascii=False)


def _layers(text: str) -> Mapping[str, Mapping[str, object]] | None:
    read = parse_json(text)
    value = None if read.problems else read.value
    layers = value.get("layers") if isinstance(value, dict) else None
    if not isinstance(layers, dict):
        return None
    found = {name: said for name, said in layers.items() if isinstance(said, dict)}
    return found if len(found) == len(layers) else None


def _flat(found: _Object) -> _Object:
    """What an object says, at the top or in ``params``, as ComfyUI reads it."""
    params = found.get("params")
    return found if not isinstance(params, dict) else {**params, **found}


def _literals_in(template: _Object, found: _Object) -> bool:
    """Whether everything that is said literally in a template is said in an object too."""
    return all(
        found.get(key) == value for key, value in template.items() if not _is_variable(value)
    ) and any(key in found for key in template)


def _differs(template: _Object, found: _Object, values: dict[str, Any]) -> str | None:
    """Where an object is not what a template says, collecting what its variables stand for."""
    for key, wanted in template.items():
        if key not in found:
            return f"{key!r} is missing"
        reason = _value_differs(key, wanted, found[key], values)
        if reason is not None:
            return reason
    return None


def _value_differs(key: str, wanted: Any, value: Any, values: dict[str, Any]) -> str | None:
    if _is_variable(wanted):
        if values.setdefault(wanted, value) != value:
            return f"{key!r} contradicts what it says elsewhere"
        return None
    if isinstance(wanted, list):
        if not isinstance(value, list) or len(value) != len(wanted):
            return f"{key!r} is no list of {len(wanted)}"
        pairs = zip(wanted, value, strict=True)
        return next(filter(None, (_value_differs(key, *pair, values) for pair in pairs)), None)
    if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
        return f"{key!r} is not {wanted!r}"
    return None


def variables(template: Any) -> Iterator[str]:
    """What a template has in the place of numbers."""
    if _is_variable(template):
        yield template
    elif isinstance(template, dict):
        for value in template.values():
            yield from variables(value)
    elif isinstance(template, list):
        for value in template:
            yield from variables(value)


def _filled(template: Any, values: Mapping[str, Any]) -> Any:
    if _is_variable(template):
        return values.get(template, template)
    if isinstance(template, dict):
        return {key: _filled(value, values) for key, value in template.items()}
    if isinstance(template, list):
        return [_filled(value, values) for value in template]
    return template


def _is_variable(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("$")


def _short(value: Mapping[str, object]) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
