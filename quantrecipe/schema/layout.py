"""The layout, version 1: how formats are laid out on disk, as data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag

from quantrecipe.schema.base import (
    MODULE_TEMPLATE,
    NAME_MAPPING,
    OTHER_TEMPLATE,
    Model,
    Name,
    NonEmpty,
    VersionOne,
)
from quantrecipe.schema.packings import PackingName
from quantrecipe.schema.schemes import (
    GranularityName,
    Hadamard,
    ScaledFormatName,
)

LAYOUT_VERSION = 1

ModuleTemplate = Annotated[
    str,
    StringConstraints(pattern=MODULE_TEMPLATE, max_length=256),
]
"""A tensor name with ``{module}`` in it, and ``{part}`` before that where parts share a file."""

OtherTemplate = Annotated[
    str,
    StringConstraints(pattern=OTHER_TEMPLATE, max_length=256),
]
"""A tensor name with ``{tensor}`` in it, and ``{part}`` before that where parts share a file."""

MappedName = Annotated[
    str,
    StringConstraints(pattern=NAME_MAPPING, max_length=256),
]
"""A module's dotted name; a segment that is ``*`` stands for any one segment."""

StoredDType = Literal[
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "uint8",
    "int32",
    "int64",
    "float8_e4m3fn",
    "float8_e5m2",
]
DimName = Literal["out", "in", "groups", "row_blocks", "column_blocks"]


def _dim_type(value: Any) -> str | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return "integer"
    return "name" if isinstance(value, str) else None


Dim = Annotated[
    Annotated[Annotated[int, Field(ge=1)], Tag("integer")] | Annotated[DimName, Tag("name")],
    Discriminator(_dim_type),
]
"""A dimension: a number, or a name that the plan knows the value of."""

Shape = tuple[Dim, ...]


class TensorTemplate(Model):
    """One tensor of a module: what it is called, and what it holds."""

    name: ModuleTemplate
    """The name that is written, and looked for first."""

    aliases: tuple[ModuleTemplate, ...] = ()
    """Other names that are read."""

    optional: bool = False
    """Whether a module may do without it."""


class CodesTemplate(TensorTemplate):
    """The numbers of a weight, ``[out, in]``, in the dtype of the format, or its codes packed."""

    packing: PackingName | None = None
    """How the codes of a row share stored numbers; dtype and shape follow from it. Absent: they do
    not. Formats with codes of 4 bits need one."""


class ScalesTemplate(TensorTemplate):
    """The scales of a weight."""

    dtypes: Annotated[tuple[StoredDType, ...], NonEmpty]
    """The dtypes they may have."""

    shapes: Annotated[dict[GranularityName, Annotated[tuple[Shape, ...], NonEmpty]], NonEmpty]
    """For each granularity the shapes that are read; the first is written."""


class ZeroPointsTemplate(TensorTemplate):
    """The zero points of a weight, ``[out, groups]``, uint8 if they are not packed.

    A layout has a place for weights with and without them, unless it asks for the tensor.
    """

    packing: PackingName | None = None
    """How the zero points of a column of groups share stored numbers, from row to row."""


class ShapeTemplate(TensorTemplate):
    """The shape of a packed weight, ``[2]``: out and in features."""

    dtype: Literal["int64"]
    """The dtype it has."""


class SmoothingTemplate(TensorTemplate):
    """Smoothing factors, ``[in]``."""

    dtype: Literal["float32"]
    """The dtype they have."""

    activations: Literal["divide"]
    """What a loader does to activations with them."""


class ModuleTensors(Model):
    """The tensors of one module in one format."""

    weight: CodesTemplate
    """The numbers, or their codes."""

    weight_scale: ScalesTemplate | None = None
    """Scales, for formats that have them."""

    weight_zero_point: ZeroPointsTemplate | None = None
    """The codes that stand for 0, for formats that have them."""

    weight_shape: ShapeTemplate | None = None
    """Out and in features, where the layout writes them beside packed codes."""

    smoothing: SmoothingTemplate | None = None
    """Smoothing factors that a loader applies to activations."""

    bias: TensorTemplate | None = None
    """The bias, in its own dtype."""

    input_scale: TensorTemplate | None = None
    """A static activation scale. It is recognised when read; nothing here writes one."""


class OtherTensors(Model):
    """Tensors that belong to no module."""

    name: OtherTemplate
    """What they are called."""


class Holds(Model):
    """What the layout has a place for, in one format."""

    granularity: Annotated[tuple[GranularityName, ...], NonEmpty]
    """The granularities it can say."""

    smoothing: tuple[Literal["online"], ...] = ()
    """Where smoothing factors may live; folded ones need no place, and any layout takes them."""

    rotation: tuple[Hadamard, ...] = ()
    """The rotations that it says of a module; a reader that is not told would be wrong."""

    block_size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """The one block size that granularity ``block`` stands for; ``[1, 64]`` for nf4."""


class LayoutModules(Model):
    """For each format, the tensors a module in it has."""

    plain: ModuleTensors
    """A module without scales: protected, or passed through."""

    int8: ModuleTensors | None = None
    float8_e4m3fn: ModuleTensors | None = None
    float8_e5m2: ModuleTensors | None = None
    int4: ModuleTensors | None = None
    nf4: ModuleTensors | None = None


class NameMapping(Model):
    """What a module of a source is called here: another name, or several for equal row slices."""

    source: MappedName = Field(alias="from")
    """Its name in a source, or that of what has tensors without being a module, as a norm."""

    into: Annotated[tuple[MappedName, ...], NonEmpty]
    """Its name here. Several: its rows are cut into as many equal parts, in this order. The first
    ``*`` of each stands for what the first of ``from`` does, and so on."""


class ConfigFragments(Model):
    """What a layout writes into the ``config.json`` of each part."""

    quantization_config: Literal["quantrecipe", "compressed-tensors"]
    """What ``quantization_config`` says, and to whom. ``quantrecipe``: every module and its scheme,
    for this project's adapters; see the schema ``quantization_config``. ``compressed-tensors``: a
    config group for each scheme, for that package and what is built on it."""


class Layout(Model):
    """How formats are laid out on disk: tensor names, dtypes, shapes and file metadata."""

    schema_uri: Annotated[str, StringConstraints(max_length=1024)] | None = Field(
        default=None, alias="$schema"
    )
    """For editors: this schema's URN or the relative path of a copy of it."""

    kind: Literal["layout"]
    version: VersionOne
    name: Name
    """What the layout is called."""

    description: str | None = None
    """Who reads and writes it."""

    modules: LayoutModules
    """The tensors of a module, for each format."""

    others: OtherTensors
    """Every other tensor."""

    names: tuple[NameMapping, ...] = ()
    """What is called otherwise here than in a source that is converted; the first entry that fits
    counts. Rules, statistics and locks speak of the names here."""

    holds: dict[ScaledFormatName, Holds] = Field(default={})
    """What it has a place for, beyond plain dtypes."""

    config: ConfigFragments | None = None
    """What goes into the ``config.json`` beside each part; absent: nothing."""

    metadata: dict[Annotated[str, NonEmpty], str] = Field(default={})
    """Entries of the safetensors metadata of every file."""

    markers: tuple[str, ...] = ()
    """Tensors that only mark a file as one of this layout; read over, and not carried on."""
