"""What looks wrong in a checkpoint although the layout it is read through has no word for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from quantrecipe.schema.json_text import parse_json
from quantrecipe.schema.layout import Layout, TensorTemplate
from quantrecipe.schema.layout_reading import (
    SCALED_FORMATS,
    could_be,
    match_template,
    roles,
)
from quantrecipe.schema.plan_metadata import TORCHAO_KEY
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.recognition import Reading
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.tensors import SourcePart, TensorInfo

_PACKED: Final = frozenset({"uint8", "int16", "uint16", "int32", "uint32"})
_COMMON: Final = ".scale"
"""Norms have tensors of that name too: it says something beside a module's weight only."""

_CLASSES: Final = {
    "int8": "Int8Tensor",
    "float8_e4m3fn": "Float8Tensor",
    "nvfp4": "NVFP4Tensor",
}
_EIGHT_BITS: Final = ("int8", "float8_e4m3fn", "float8_e5m2")


def stray_scales(reading: Reading, layouts: Iterable[Layout]) -> Iterator[Problem]:
    """Tensors that are called like those beside codes in some known layout, with no codes here.

    A layout without scales takes them for tensors like any other, so that alone would hide them. A
    module named like one is no proof: its dimensions have to be those of one too.
    """
    templates = [
        (name, role, layout.name, template)
        for layout in layouts
        if "{part}" not in layout.others.name and layout.name != reading.layout.name
        for role, template in _beside_codes(layout)
        for name in (template.name, *template.aliases)
    ]
    known = {problem.tensor for problem in reading.problems}
    for part in reading.parts:
        for name, info in reading.contents[part.name].others.items():
            if info.name in known:
                continue
            for text, role, layout_name, template in templates:
                module = match_template(text, name, part.name, "module")
                if module is None or not could_be(template, info):
                    continue
                if text.endswith(_COMMON) and module not in reading.contents[part.name].modules:
                    continue
                yield Problem(
                    "orphan-scale",
                    f"called like a {role.replace('_', ' ')} of layout {layout_name!r}, and there "
                    "is no quantized weight that it could belong to",
                    hint="Either the weight is missing or it was dequantized and the scale "
                    "left behind: a reader that applies it scales a second time.",
                    file=str(info.file),
                    tensor=info.name,
                )
                break


def _beside_codes(layout: Layout) -> Iterator[tuple[str, TensorTemplate]]:
    for scaled in SCALED_FORMATS:
        templates = getattr(layout.modules, scaled)
        for role, template in roles(templates) if templates is not None else ():
            if role not in ("bias", "smoothing"):
                yield role, template


def packed_weights(reading: Reading) -> Iterator[Problem]:
    """Weights in whole numbers that no format here stores: codes in some packing."""
    for contents in reading.contents.values():
        for name, info in contents.others.items():
            if name.endswith(".weight") and info.dtype in _PACKED and len(info.shape) >= 2:
                yield Problem(
                    "unexplained-weight",
                    f"a weight of dtype {info.dtype}: codes in a packing that no known layout and "
                    "no known marker explains",
                    hint="Find out what wrote it; read as plain numbers it is noise.",
                    file=str(info.file),
                    tensor=info.name,
                )


def idle_markers(reading: Reading) -> Iterator[Problem]:
    """Markers that say that something is quantized where nothing is."""
    if reading.quantized:
        return
    for name in reading.layout.markers:
        info = reading.parts[0].tensors.get(name)
        if info is not None:
            yield Problem(
                "idle-marker",
                f"marks a checkpoint as being in layout {reading.layout.name!r}, and nothing in it "
                "is quantized",
                file=str(info.file),
                tensor=name,
            )


def torchao_problems(reading: Reading) -> Iterator[Problem]:
    """Where the metadata that torchao's reader goes by and the tensors contradict each other.

    Its reader (torchao 0.18) looks up ``tensor_names``, for each of them an entry with the class
    and the names of its tensors, and asks for every one.
    """
    if reading.layout.module_metadata != "torchao":
        return
    for part in reading.parts:
        said, names = _torchao_entries(part)
        for name, tensors in said.items():
            for tensor in tensors - part.tensors.keys():
                yield Problem(
                    "metadata-differs",
                    f"the metadata say that {name!r} has a tensor {tensor!r}, and it is not there",
                    hint="torchao refuses such a file; get the whole checkpoint.",
                    file=str(part.files[0].path),
                    tensor=tensor,
                )
        for module in reading.contents[part.name].modules.values():
            if not isinstance(module.weight, ScaledWeight):
                continue
            weight = module.tensors["weight"]
            logical = f"{module.name}.weight"
            wanted = _CLASSES.get(module.weight.format)
            found = _torchao_class(part, logical)
            if logical not in names or found != wanted:
                told = f"that it is {found}" if found is not None else "nothing of it"
                yield Problem(
                    "metadata-differs",
                    f"{logical!r} is stored as torchao's {wanted} is, and the metadata say {told}",
                    hint="torchao reads by the metadata alone: it does not find this weight, or "
                    "takes it for something else.",
                    file=str(weight.file),
                    tensor=weight.name,
                )


def _torchao_entries(part: SourcePart) -> tuple[Mapping[str, frozenset[str]], frozenset[str]]:
    """The tensors of every name that the metadata list, and the names."""
    entries: dict[str, frozenset[str]] = {}
    listed: set[str] = set()
    for file in part.files:
        read = parse_json(file.metadata.get(TORCHAO_KEY, "[]")).value
        for name in read if isinstance(read, list) else ():
            if not isinstance(name, str):
                continue
            listed.add(name)
            said = parse_json(file.metadata.get(name, "{}")).value
            parts = said.get("_tensor_data_names") if isinstance(said, dict) else None
            if isinstance(parts, list):
                stem, _, last = name.rpartition(".")
                before = f"{stem}." if stem else ""
                entries[name] = frozenset(f"{before}_{last}_{each}" for each in parts)
            else:
                entries[name] = frozenset({name})
    return entries, frozenset(listed)


def _torchao_class(part: SourcePart, name: str) -> str | None:
    for file in part.files:
        said = parse_json(file.metadata.get(name, "null")).value
        if isinstance(said, dict) and isinstance(said.get("_type"), str):
            return str(said["_type"])
    return None


def flat_scales(reading: Reading) -> list[TensorInfo]:
    """Scales of rows that have one dimension: many readers multiply by them as they are."""
    return [
        module.tensors["weight_scale"]
        for module in reading.modules()
        if isinstance(module.weight, ScaledWeight)
        and module.weight.format in _EIGHT_BITS
        and module.weight.granularity == "channel"
        and "weight_scale" in module.tensors
        and len(module.tensors["weight_scale"].shape) == 1
    ]
