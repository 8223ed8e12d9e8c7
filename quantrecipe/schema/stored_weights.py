"""The weight format that the shape of a scale says."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from pydantic import ValidationError

from quantrecipe.schema.layout import Holds, ScalesTemplate, Shape
from quantrecipe.schema.schemes import (
    AnyScaledWeight,
    Float8Block,
    Float8Channel,
    Float8Tensor,
    GranularityName,
    Int4Group,
    Int8Channel,
    Int8Group,
    Int8Tensor,
    Nf4,
    ScaledFormatName,
)
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
        }
    )
)


def stored_weight(
    scaled: ScaledFormatName,
    template: ScalesTemplate,
    holds: Holds,
    scale: TensorInfo,
    weight_shape: tuple[int, int],
    *,
    zero_points: bool,
) -> AnyScaledWeight | None:
    """How a weight of this shape and with this scale is stored; ``None`` if no shape reads it.

    Where two granularities give the scale the same shape (a single row, a single group), they mean
    the same numbers, and the first that the layout holds is taken.
    """
    for granularity in holds.granularity:
        for shape in template.shapes.get(granularity, ()):
            found = _read_shape(
                scaled, granularity, shape, scale, weight_shape, holds, zero_points=zero_points
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
) -> AnyScaledWeight | None:
    model = _MODELS.get((scaled, granularity))
    if model is None or len(shape) != len(scale.shape):
        return None
    out_features, in_features = weight_shape
    dims: dict[str, int] = {"out": out_features, "in": in_features}
    fields: dict[str, object] = {"scale_dtype": scale.dtype}
    if granularity == "group" and "groups" in shape:
        groups = scale.shape[shape.index("groups")]
        if groups == 0 or in_features % groups:
            return None
        dims["groups"] = groups
        fields["group_size"] = in_features // groups
    if granularity == "block":
        if holds.block_size is None:
            return None
        rows, columns = holds.block_size
        dims["row_blocks"] = -(-out_features // rows)
        dims["column_blocks"] = -(-in_features // columns)
        fields["block_size"] = columns if model is Nf4 else holds.block_size
    if model is Int4Group:
        fields["symmetric"] = not zero_points
    if any(
        (dims.get(dim) if isinstance(dim, str) else dim) != size
        for dim, size in zip(shape, scale.shape, strict=True)
    ):
        return None
    try:
        return model.model_validate({"format": scaled, "granularity": granularity, **fields})
    except ValidationError:
        # Groups larger than a recipe may say, or of no columns at all.
        return None
