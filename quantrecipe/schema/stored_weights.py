"""The weight format that the shape of a scale says."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from pydantic import ValidationError

from quantrecipe.schema.layout import (
    ConstantTemplate,
    Holds,
    ScalesTemplate,
    SecondScaleTemplate,
    Shape,
)
from quantrecipe.schema.schemes import (
    AnyScaledWeight,
    Float8Block,
    Float8Channel,
    Float8Tensor,
    GgmlRecords,
    GranularityName,
    Int4Group,
    Int8Channel,
    Int8Group,
    Int8Tensor,
    LlmInt8,
    MxFp4,
    MxFp8,
    Nf4,
    NvFp4,
    ScaledFormatName,
    ScaledWeight,
)
from quantrecipe.schema.storage import TILE_COLUMNS, TILE_ROWS, padded
from quantrecipe.schema.tensors import TensorInfo

_MODELS: Final[Mapping[tuple[ScaledFormatName, GranularityName], type[AnyScaledWeight]]] = (
    MappingProxyType(
        {
            ("int8", "tensor"): Int8Tensor,
            ("int8", "channel"): Int8Channel,
            ("int8", "group"): Int8Group,
            ("float8_e4m3fn", "tensor"): Float8Tensor,
            ("float8_e4m3fn", "channel"): Float8Channel,
            ("float8_e4m3fn", "block"): Float8Block,
            ("float8_e5m2", "tensor"): Float8Tensor,
            ("float8_e5m2", "channel"): Float8Channel,
            ("float8_e5m2", "block"): Float8Block,
            ("int4", "group"): Int4Group,
            ("nf4", "block"): Nf4,
            ("llm_int8", "channel"): LlmInt8,
            ("mxfp8", "group"): MxFp8,
            ("mxfp4", "group"): MxFp4,
            ("nvfp4", "group"): NvFp4,
        }
    )
)


NESTED_BLOCK: Final = 256
"""Scales that share a scale, where scales of nf4 have two levels."""


def scale_dims(weight: ScaledWeight, weight_shape: tuple[int, int]) -> Mapping[str, int]:
    """What the named dimensions of shapes stand for, for a weight that is stored so."""
    out_features, in_features = weight_shape
    rows, columns = weight.scale_grid(out_features, in_features)
    dims = {"out": out_features, "in": in_features, "scales": rows * columns}
    dims["scale_blocks"] = -(-rows * columns // NESTED_BLOCK)
    dims["padded_out"] = padded(rows, TILE_ROWS)
    dims["padded_groups"] = padded(columns, TILE_COLUMNS)
    # torchao gives the same tiles the shape of one tile as it lies, 32 by 16.
    dims["tile_rows"] = dims["padded_out"] // 4
    dims["tile_columns"] = dims["padded_groups"] * 4
    if weight.granularity == "group":
        dims["groups"] = columns
    if weight.granularity == "block":
        dims |= {"row_blocks": rows, "column_blocks": columns}
    return dims


def fill_shape(shape: Shape, dims: Mapping[str, int]) -> tuple[int, ...]:
    """A shape with numbers for its named dimensions."""
    return tuple(dims[dim] if isinstance(dim, str) else dim for dim in shape)


def shapes_of_second(
    template: SecondScaleTemplate, weight: ScaledWeight, weight_shape: tuple[int, int]
) -> tuple[tuple[int, ...], ...]:
    """The shapes that the second level of scales may have; the first is written."""
    dims = scale_dims(weight, weight_shape)
    return tuple(fill_shape(shape, dims) for shape in template.shapes)


def shape_of_constant(template: ConstantTemplate, weight_shape: tuple[int, int]) -> tuple[int, ...]:
    """The shape of a tensor that says the same of every module."""
    return fill_shape(template.shape, {"out": weight_shape[0], "in": weight_shape[1]})


def records(scaled: str) -> GgmlRecords:
    """The format of that name whose scales lie between its codes."""
    return GgmlRecords.model_validate({"format": scaled, "granularity": "block"})


def stored_weight(
    scaled: ScaledFormatName,
    template: ScalesTemplate,
    holds: Holds,
    scale: TensorInfo,
    weight_shape: tuple[int, int],
    *,
    zero_points: bool,
    two_levels: bool,
) -> AnyScaledWeight | None:
    """How a weight of this shape and with this scale is stored; ``None`` if no shape reads it.

    Where two granularities give the scale the same shape (a single row, a single group), they mean
    the same numbers, and the first that the layout holds is taken.
    """
    for granularity in holds.granularity:
        for shape in template.shapes.get(granularity, ()):
            found = _read_shape(
                scaled,
                granularity,
                shape,
                scale,
                weight_shape,
                holds,
                zero_points=zero_points,
                two_levels=two_levels,
            )
            if found is not None and found.refuses(*weight_shape) is None:
                return found
    return None


def _read_shape(
    scaled: ScaledFormatName,
    granularity: GranularityName,
    shape: Shape,
    scale: TensorInfo,
    weight_shape: tuple[int, int],
    holds: Holds,
    *,
    zero_points: bool,
    two_levels: bool,
) -> AnyScaledWeight | None:
    model = _MODELS.get((scaled, granularity))
    if model is None or len(shape) != len(scale.shape):
        return None
    fields = _fields(model, granularity, shape, scale, weight_shape, holds)
    if fields is None:
        return None
    if issubclass(model, Nf4):
        fields["double_quantized"] = two_levels
        if scale.dtype != ("uint8" if two_levels else "float32"):
            return None
    if model is Int4Group:
        fields["symmetric"] = not zero_points
    try:
        found = model.model_validate({"format": scaled, "granularity": granularity, **fields})
    except ValidationError:
        # Groups larger than a recipe may say, or of no columns at all.
        return None
    if found.refuses(*weight_shape) is not None:
        return None
    dims = scale_dims(found, weight_shape)
    known = all(not isinstance(dim, str) or dim in dims for dim in shape)
    return found if known and fill_shape(shape, dims) == scale.shape else None


def _fields(
    model: type[AnyScaledWeight],
    granularity: GranularityName,
    shape: Shape,
    scale: TensorInfo,
    weight_shape: tuple[int, int],
    holds: Holds,
) -> dict[str, object] | None:
    """What the dtype and the shape of a scale say of a weight."""
    fields: dict[str, object] = {}
    if issubclass(model, MxFp8 | MxFp4 | NvFp4):
        # What a header may call bytes.
        own = "float8_e4m3fn" if issubclass(model, NvFp4) else "float8_e8m0fnu"
        if scale.dtype not in (own, "uint8"):
            return None
    elif not issubclass(model, Nf4):
        fields["scale_dtype"] = scale.dtype
    if granularity == "group" and "groups" in shape:
        groups = scale.shape[shape.index("groups")]
        if groups == 0 or weight_shape[1] % groups:
            return None
        fields["group_size"] = weight_shape[1] // groups
    if granularity == "block":
        if holds.block_size is None:
            return None
        fields["block_size"] = holds.block_size[1] if model is Nf4 else holds.block_size
    return fields
