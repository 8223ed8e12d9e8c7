"""The layout, version 1: how formats are laid out on disk, as data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, StringConstraints, Tag

from quantrecipe.schema.base import (
    MODULE_TEMPLATE,
    OTHER_TEMPLATE,
    Model,
    Name,
    NonEmpty,
    VersionOne,
)
from quantrecipe.schema.dtypes import PlainDType
from quantrecipe.schema.schemes import (
    GranularityName,
    Hadamard,
    ScaledFormatName,
)
from quantrecipe.schema.storage import Arrangement, PackingName

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
    "float8_e8m0fnu",
]
DimName = Literal[
    "out",
    "in",
    "groups",
    "row_blocks",
    "column_blocks",
    "scales",
    "scale_blocks",
    "padded_out",
    "padded_groups",
    "tile_rows",
    "tile_columns",
]


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

    shape: Literal["rows", "column"] = "rows"
    """``rows``: ``[out, ...]``. ``column``: ``[all stored numbers, 1]``, row after row; then the
    layout's ``marker`` says how many out and in features there are."""

    grouped: bool = False
    """Whether codes with scales by group are ``[out, groups, columns of a group]``. A weight of one
    group a row is stored by channel there."""


class ScalesTemplate(TensorTemplate):
    """The scales of a weight."""

    dtypes: Annotated[tuple[StoredDType, ...], NonEmpty]
    """The dtypes they may have."""

    shapes: Annotated[dict[GranularityName, Annotated[tuple[Shape, ...], NonEmpty]], NonEmpty]
    """For each granularity the shapes that are read; the first is written."""

    arrangement: Arrangement = "rows"
    """In which order they lie: row after row, or in the tiles that GPUs read, ``tiles-128x4``: 128
    rows by 4 columns at a time, filled up with zeros."""


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


class SecondScaleTemplate(TensorTemplate):
    """The second level of scales, float32: one for all scales, or one for each 256 of them."""

    dtype: Literal["float32"]
    """The dtype it has."""

    shapes: Annotated[tuple[Shape, ...], NonEmpty]
    """The shapes that are read; the first is written."""

    meaning: Literal["multiply", "divide"] = "multiply"
    """What is done to scales with it."""


class ScaleOffsetTemplate(TensorTemplate):
    """What is added to scales that are stored less their mean, float32 ``[1]``."""

    dtype: Literal["float32"]
    """The dtype it has."""


class MarkerTemplate(TensorTemplate):
    """A tensor that holds a JSON object about its module, as UTF-8 bytes.

    Values that begin with ``$`` stand for numbers: ``$out`` and ``$in`` features, the size of its
    ``$rotation``, the ``$offset`` of its scales, and ``$dtype``, what the weight is decoded to.
    """

    json_object: dict[Annotated[str, NonEmpty], JsonValue] = Field(alias="json")
    """What it says of every module. More may be there when it is read."""

    rotated: dict[Annotated[str, NonEmpty], JsonValue] | None = None
    """What it says besides where the weight is rotated; absent: no weight is."""

    two_levels: dict[Annotated[str, NonEmpty], JsonValue] | None = None
    """What it says besides where scales have two levels."""

    length: Annotated[int, Field(ge=2, le=1024)] | None = None
    """How many bytes it has, with blanks at the end, where it says what is known only at the end:
    ``$offset``. Absent: as many as it needs."""


class ConstantTemplate(TensorTemplate):
    """A tensor that says the same of every module."""

    dtype: StoredDType
    """The dtype it has."""

    shape: Shape
    """The shape it has."""

    content: Literal["zeros", "nf4-levels", "dynamic-8bit-levels"]
    """What is in it: zeros, or what codes stand for."""


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

    second_scale: SecondScaleTemplate | None = None
    """A second level of scales, for formats that have it."""

    scale_offset: ScaleOffsetTemplate | None = None
    """What is added to scales of two levels, for formats that have it and no ``marker`` for it."""

    marker: MarkerTemplate | None = None
    """What says in JSON how the module is stored."""

    code_map: ConstantTemplate | None = None
    """What codes stand for, written beside them."""

    scale_map: ConstantTemplate | None = None
    """What the codes of scales stand for, written beside scales of two levels."""

    zeros: ConstantTemplate | None = None
    """A tensor that readers ask for and that says nothing."""

    smoothing: SmoothingTemplate | None = None
    """Smoothing factors that a loader applies to activations."""

    bias: TensorTemplate | None = None
    """The bias, in its own dtype."""

    input_scale: TensorTemplate | None = None
    """A static activation scale. It is recognised when read; nothing here writes one."""

    refused: tuple[ModuleTemplate, ...] = ()
    """Tensors that change what a weight stands for and that nothing here applies: a module that has
    one is refused."""


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

    multiples: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """What out and in features have to be multiples of: its readers fill up weights of other
    shapes, and nothing in a file would say that they did."""


class LayoutModules(Model):
    """For each format, the tensors a module in it has."""

    plain: ModuleTensors
    """A module without scales: protected, or passed through."""

    int8: ModuleTensors | None = None
    float8_e4m3fn: ModuleTensors | None = None
    float8_e5m2: ModuleTensors | None = None
    int4: ModuleTensors | None = None
    nf4: ModuleTensors | None = None
    llm_int8: ModuleTensors | None = None
    mxfp8: ModuleTensors | None = None
    mxfp4: ModuleTensors | None = None
    nvfp4: ModuleTensors | None = None
    q8_0: ModuleTensors | None = None
    q4_0: ModuleTensors | None = None
    q4_k: ModuleTensors | None = None
    q6_k: ModuleTensors | None = None


class ConfigFragments(Model):
    """What a layout writes into the ``config.json`` of each part."""

    quantization_config: Literal[
        "quantrecipe",
        "compressed-tensors",
        "bitsandbytes",
        "torchao",
        "sdnq",
        "int8",
    ]
    """What ``quantization_config`` says, and to whom. ``quantrecipe``: every module and its scheme,
    for this project's adapters; see the schema ``quantization_config``. ``compressed-tensors``: a
    config group for each scheme, for that package and what is built on it. ``bitsandbytes``,
    ``torchao`` and ``sdnq``: what those packages ask for. ``int8``: what vllm-omni asks for."""


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

    holds: dict[ScaledFormatName, Holds] = Field(default={})
    """What it has a place for, beyond plain dtypes."""

    container: Literal["safetensors", "gguf"] = "safetensors"
    """What kind of file it is in."""

    vectors: PlainDType | None = None
    """What tensors of one dimension are stored in; absent: what the source has them in."""

    config: ConfigFragments | None = None
    """What goes into the ``config.json`` beside each part; absent: nothing."""

    metadata: dict[Annotated[str, NonEmpty], str] = Field(default={})
    """Entries of the metadata of every file."""

    module_metadata: Literal["comfyui", "torchao"] | None = None
    """What the metadata of a file say of its modules, and to whom: ``comfyui``: the contents of all
    markers once more, under ``_quantization_metadata``. ``torchao``: the class and the tensors of
    every weight."""

    markers: tuple[str, ...] = ()
    """Tensors that only mark a file as one of this layout; read over, and not carried on."""
