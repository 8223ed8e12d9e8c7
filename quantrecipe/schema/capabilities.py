"""What a converter or a loader can do, declared; and what a recipe asks of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.schemes import (
    GranularityName,
    PlainWeight,
    ScaledWeight,
    SmoothingPlacement,
)

ANY: frozenset[str] = frozenset({"*"})
"""Every name, also ones that are not known here."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a converter or a loader declares; planning holds a recipe against it.

    Attributes:
        schema_versions: recipe versions it understands.
        formats: weight formats, each with its granularities (empty for plain ones).
        layouts: names of layouts it reads or writes; ``ANY`` for every layout that is data.
        activations: activation formats.
        smoothing: where smoothing may be applied.
        rotations: kinds of rotation.
        quantizers: kinds of quantizer.
        devices: where it computes.
    """

    schema_versions: frozenset[int]
    formats: Mapping[str, frozenset[GranularityName]]
    layouts: frozenset[str] = ANY
    activations: frozenset[str] = frozenset()
    smoothing: frozenset[SmoothingPlacement] = frozenset()
    rotations: frozenset[str] = frozenset()
    quantizers: frozenset[str] = frozenset({"absmax"})
    devices: frozenset[str] = frozenset({"cpu"})


BUILT_IN = Capabilities(
    schema_versions=frozenset({1}),
    formats={
        "float64": frozenset(),
        "float32": frozenset(),
        "float16": frozenset(),
        "bfloat16": frozenset(),
        "int8": frozenset({"tensor", "channel", "group"}),
        "float8_e4m3fn": frozenset({"tensor", "channel", "block"}),
        "float8_e5m2": frozenset({"tensor", "channel", "block"}),
        "int4": frozenset({"group"}),
        "nf4": frozenset({"block"}),
        "llm_int8": frozenset({"channel"}),
        "mxfp8": frozenset({"group"}),
        "mxfp4": frozenset({"group"}),
        "nvfp4": frozenset({"group"}),
        "q8_0": frozenset({"block"}),
        "q4_0": frozenset({"block"}),
        "q4_k": frozenset({"block"}),
        "q6_k": frozenset({"block"}),
    },
    activations=frozenset({"int8", "float8_e4m3fn"}),
    smoothing=frozenset({"online", "fold"}),
    quantizers=frozenset({"absmax", "clip-search", "ocp-floor"}),
    rotations=frozenset({"hadamard"}),
)
"""All that this package's own converters and loaders can do."""


@dataclass(frozen=True, slots=True)
class Need:
    """One thing that a recipe asks for.

    Attributes:
        aspect: which field of ``Capabilities`` it concerns.
        value: what has to be in it.
        pointer: where the recipe asks for it.
        granularity: of a format, where it has one.
    """

    aspect: Literal[
        "schema_versions",
        "formats",
        "layouts",
        "activations",
        "smoothing",
        "rotations",
        "quantizers",
    ]
    value: str | int
    pointer: str
    granularity: GranularityName | None = field(default=None)

    def met_by(self, able: Capabilities) -> bool:
        """Whether ``able`` has it."""
        if self.aspect == "formats":
            granularities = able.formats.get(str(self.value))
            if granularities is None:
                return False
            return self.granularity is None or self.granularity in granularities
        have: frozenset[object] = getattr(able, self.aspect)
        return self.value in have or "*" in have

    def __str__(self) -> str:
        what = self.aspect.replace("_", " ").removesuffix("s")
        by = f" by {self.granularity}" if self.granularity else ""
        return f"{what} {self.value}{by}"


def needs(recipe: Recipe, layouts: Iterable[tuple[str, str]]) -> tuple[Need, ...]:
    """What a recipe asks of whoever carries it out.

    Args:
        recipe: the recipe.
        layouts: name and pointer of each layout involved, resolved.
    """
    found = [Need("schema_versions", recipe.version, "/version")]
    found += [Need("layouts", name, pointer) for name, pointer in layouts]
    for name, scheme in recipe.schemes.items():
        pointer = f"/schemes/{name}"
        weight = scheme.weight
        if isinstance(weight, PlainWeight):
            found.append(Need("formats", weight.format, f"{pointer}/weight/format"))
        elif isinstance(weight, ScaledWeight):
            found.append(
                Need(
                    "formats",
                    weight.format,
                    f"{pointer}/weight/format",
                    weight.granularity,
                )
            )
            found.append(Need("quantizers", weight.quantizer.kind, f"{pointer}/weight/quantizer"))
        if scheme.activation is not None:
            found.append(
                Need("activations", scheme.activation.format, f"{pointer}/activation/format")
            )
        if scheme.smoothing is not None:
            found.append(Need("smoothing", scheme.smoothing.apply, f"{pointer}/smoothing/apply"))
        if scheme.rotation is not None:
            found.append(Need("rotations", scheme.rotation.kind, f"{pointer}/rotation/kind"))
    for index, entry in enumerate(recipe.protected):
        found.append(Need("formats", entry.dtype, f"/protected/{index}/dtype"))
    if recipe.target.passthrough_dtype != "keep":
        found.append(Need("formats", recipe.target.passthrough_dtype, "/target/passthrough_dtype"))
    return tuple(found)


def missing(able: Capabilities, wanted: Iterable[Need]) -> tuple[Need, ...]:
    """The needs that ``able`` does not meet."""
    return tuple(need for need in wanted if not need.met_by(able))
