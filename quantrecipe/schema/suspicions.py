"""What looks wrong in a checkpoint although the layout it is read through has no word for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from quantrecipe.schema.layout import Layout, TensorTemplate
from quantrecipe.schema.layout_reading import SCALED_FORMATS, match_template
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.recognition import Reading
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.tensors import TensorInfo

_PACKED: Final = frozenset({"uint8", "int16", "uint16", "int32", "uint32"})


def stray_scales(reading: Reading, layouts: Iterable[Layout]) -> Iterator[Problem]:
    """Tensors that are called like a scale of some known layout, and scale nothing here.

    A layout without scales takes them for tensors like any other, so that alone would hide them.
    """
    templates = {
        (name, role): layout.name
        for layout in layouts
        if "{part}" not in layout.others.name and layout.name != reading.layout.name
        for scaled in SCALED_FORMATS
        for role in ("weight_scale", "input_scale")
        for name in _names(layout, scaled, role)
    }
    known = {problem.tensor for problem in reading.problems}
    for part in reading.parts:
        for name, info in reading.contents[part.name].others.items():
            if info.name in known:
                continue
            for (template, role), layout in templates.items():
                if match_template(template, name, part.name, "module") is not None:
                    yield Problem(
                        "orphan-scale",
                        f"called like a {role.replace('_', ' ')} of layout {layout!r}, and there "
                        "is no quantized weight that it could belong to",
                        hint="Either the weight is missing or it was dequantized and the scale "
                        "left behind.",
                        file=str(info.file),
                        tensor=info.name,
                    )
                    break


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


def scale_tensors(reading: Reading) -> Mapping[str, TensorInfo]:
    """The small tensors whose values are factors: positive and finite, or something is wrong.

    Scales that may be 0 are left out.
    """
    return {
        info.name: info
        for module in reading.modules()
        for role, info in module.tensors.items()
        if role in ("weight_scale", "smoothing", "input_scale")
        and not (
            role == "weight_scale"
            and isinstance(module.weight, ScaledWeight)
            and module.weight.has_zero_scales
        )
    }


def _names(layout: Layout, scaled: str, role: str) -> tuple[str, ...]:
    templates = getattr(layout.modules, scaled)
    template: TensorTemplate | None = getattr(templates, role) if templates is not None else None
    return (template.name, *template.aliases) if template is not None else ()
