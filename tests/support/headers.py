"""Sources made of headers alone, and recipes to plan them with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_writing import marker_of, marker_template
from quantrecipe.schema.markers import marker_bytes
from quantrecipe.schema.placement import encode_header, file_order
from quantrecipe.schema.planning import make_plan
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import named_layout
from quantrecipe.schema.schemes import Hadamard
from quantrecipe.schema.tensors import OutputTensor, SourceFileInfo, SourcePart, TensorInfo

INT8 = {"weight": {"format": "int8", "granularity": "channel"}}
FP8 = {"weight": {"format": "float8_e4m3fn", "granularity": "channel"}}


def tensor(name: str, dtype: str, *shape: int) -> OutputTensor:
    return OutputTensor(name, dtype, shape)


def linear(name: str, out: int, inn: int, dtype: str = "bfloat16") -> OutputTensor:
    return tensor(f"{name}.weight", dtype, out, inn)


def fp8(name: str, out: int, inn: int) -> list[OutputTensor]:
    """A linear as the Ideogram 4 FP8 base has it."""
    weight = linear(name, out, inn, "float8_e4m3fn")
    return [weight, tensor(f"{name}.weight_scale", "float32", out)]


def file(
    path: str,
    tensors: Iterable[OutputTensor],
    metadata: Mapping[str, str] | None = None,
    contents: Mapping[str, bytes] | None = None,
) -> SourceFileInfo:
    """A file of these tensors, in the order given, as its header would describe it.

    ``contents``: of those that are read along with headers, by name.
    """
    infos: dict[str, TensorInfo] = {}
    offset = 0
    for each in tensors:
        infos[each.name] = TensorInfo(
            each.name,
            each.dtype,
            each.shape,
            Path(path),
            offset,
            each.nbytes,
            (contents or {}).get(each.name),
        )
        offset += each.nbytes
    return SourceFileInfo(Path(path), path, offset, 0, "0" * 64, dict(metadata or {}), infos)


def part(name: str, *files: SourceFileInfo) -> SourcePart:
    tensors = {info.name: info for each in files for info in each.tensors.values()}
    return SourcePart(name, Path(), tuple(files), tensors)


def source(
    *tensors: OutputTensor,
    name: str = "model",
    metadata: Mapping[str, str] | None = None,
    contents: Mapping[str, bytes] | None = None,
) -> SourcePart:
    """A part with a file of its own."""
    return part(name, file(f"{name}.safetensors", tensors, metadata, contents))


def marker(
    target: Layout,
    weight: Any,
    shape: tuple[int, int],
    outputs: Mapping[str, OutputTensor],
    rotation: Hadamard | None = None,
) -> dict[str, bytes]:
    """What the marker of a module holds, if it has one, by its name."""
    template = marker_template(target, weight)
    if template is None:
        return {}
    said = marker_of(template, weight, shape, rotation=rotation, decoded="bfloat16")
    return {outputs["marker"].name: marker_bytes(said, template.length, 0.25)}


def shared(names: Sequence[str], *tensors: OutputTensor) -> list[SourcePart]:
    """Several parts in one file."""
    one = file("shared.safetensors", tensors)
    return [part(name, one) for name in names]


def recipe(**changes: Any) -> Recipe:
    """A small recipe, with these of its fields replaced; ``rules`` may be patterns alone."""
    document: dict[str, Any] = {
        "kind": "recipe",
        "version": 1,
        "name": "small",
        "source": {"layout": "plain"},
        "schemes": {"a": INT8},
        "rules": ["**"],
        "target": {"layout": "int8-scaled"},
    } | changes
    document["rules"] = [
        {"modules": [rule], "scheme": "a"} if isinstance(rule, str) else rule
        for rule in document["rules"]
    ]
    return Recipe.model_validate_json(json.dumps(document))


def layout(base: str = "int8-scaled", **changes: Any) -> dict[str, Any]:
    """A built-in layout with these of its fields replaced, as a document."""
    return named_layout(base).to_json_value() | {"name": "custom"} | changes


def parsed(document: Mapping[str, Any]) -> Layout:
    return Layout.model_validate_json(json.dumps(document))


def problems(wanted: Recipe, *parts: SourcePart) -> tuple[Problem, ...]:
    """Everything that planning refuses."""
    try:
        make_plan(wanted, parts)
    except InvalidInput as error:
        return error.problems
    return ()


def write_sparse(
    path: Path, tensors: Iterable[OutputTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """A file with a true header and a payload that takes no room."""
    ordered = file_order(tensors)
    header = encode_header(ordered, metadata or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(each.nbytes for each in ordered))
