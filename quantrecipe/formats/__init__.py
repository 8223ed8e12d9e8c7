"""Numeric formats: how weights become codes and scales, and codes and scales weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.base import Quantized, WeightFormat, Workspace
from quantrecipe.formats.clip_search import choose_scales
from quantrecipe.formats.error import RowErrors, sqnr_db
from quantrecipe.formats.error import row_errors as _row_errors
from quantrecipe.formats.float8 import E4M3FN, E5M2
from quantrecipe.formats.int4 import Int4Format
from quantrecipe.formats.int8 import Int8Format
from quantrecipe.formats.nf4 import Nf4Format
from quantrecipe.formats.plain import PLAIN, cast, to_float32
from quantrecipe.formats.refusals import NonFinite, OutOfRange, ScaleOutOfRange, Unrepresentable
from quantrecipe.schema.dtypes import PlainDType
from quantrecipe.schema.packings import Packing
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean
from quantrecipe.schema.schemes import PlainWeight, ScaledWeight

__all__ = [
    "FORMATS",
    "PLAIN",
    "NonFinite",
    "OutOfRange",
    "Quantized",
    "RowErrors",
    "ScaleOutOfRange",
    "Unrepresentable",
    "WeightFormat",
    "Workspace",
    "cast",
    "dequantize",
    "get_format",
    "quantize",
    "row_errors",
    "rows_together",
    "sqnr_db",
    "to_float32",
]

FORMATS: Final = MappingProxyType[str, WeightFormat](
    {fmt.name: fmt for fmt in (Int8Format(), E4M3FN, E5M2, Int4Format(), Nf4Format())}
)
"""Every format with codes and scales, by name."""


def get_format(spec: ScaledWeight | str) -> WeightFormat:
    """The format of a weight spec, or the format of that name.

    Raises:
        InvalidInput: no format has that name (plain dtypes have no codes: use ``cast``).
    """
    name = spec if isinstance(spec, str) else str(getattr(spec, "format", type(spec).__name__))
    fmt = FORMATS.get(name)
    if fmt is None:
        problem = Problem(
            kind="unknown-format",
            message=f"{name!r} is no format with codes and scales",
            hint=did_you_mean(name, list(FORMATS)),
        )
        raise InvalidInput(problem)
    return fmt


def rows_together(weight: PlainWeight | ScaledWeight, packings: Mapping[str, Packing]) -> int:
    """Rows of a stored weight that must stay together to be encoded or decoded.

    Args:
        weight: how it is stored.
        packings: how its tensors are packed, by role; zero points are packed from row to row.
    """
    if isinstance(weight, PlainWeight):
        return 1
    packing = packings.get("weight_zero_point")
    together = 1 if packing is None else packing.codes
    return math.lcm(get_format(weight).row_multiple(weight), together)


def quantize(
    weight: Tensor, spec: PlainWeight | ScaledWeight, importance: Tensor | None = None
) -> Quantized:
    """A whole weight ``[out, in]`` of a plain dtype as ``spec`` stores it.

    Args:
        weight: the weight.
        spec: how it shall be stored.
        importance: what each column's squared errors count for the quantizer, float32 ``[in]``;
            ``None``: all the same.

    Raises:
        InvalidInput: ``spec`` cannot take this shape, or (``Unrepresentable``) a value in it.
    """
    if isinstance(spec, PlainWeight):
        return Quantized(cast(weight, spec.format), None)
    out_features, in_features = weight.shape
    reason = spec.refuses(out_features, in_features)
    if reason is not None:
        raise InvalidInput(Problem("shape-refused", f"the weight cannot be stored so: {reason}"))
    fmt = get_format(spec)
    values = to_float32(weight)
    scale, zero_point = choose_scales(values, fmt, spec, importance)
    codes = fmt.encode(values, scale, spec, zero_point=zero_point)
    return Quantized(codes, scale, zero_point)


def dequantize(
    codes: Tensor,
    scale: Tensor | None,
    spec: PlainWeight | ScaledWeight,
    dtype: PlainDType | torch.dtype = "float32",
    *,
    zero_point: Tensor | None = None,
) -> Tensor:
    """A whole stored weight as plain numbers.

    Args:
        codes: ``[out, in]``.
        scale: the canonical grid; ``None`` for a plain dtype.
        spec: how the weight is stored.
        dtype: rounded to this from float32; a name or torch's dtype.
        zero_point: the canonical grid, for formats that have one.

    Raises:
        InvalidInput: a value is not finite, or too large for ``dtype``.
    """
    name = dtype if isinstance(dtype, str) else _plain_name(dtype)
    if isinstance(spec, PlainWeight):
        return cast(codes, name)
    if scale is None:
        raise ValueError("codes without a scale are no numbers")
    values = get_format(spec).decode(codes, scale, spec, zero_point=zero_point)
    return values if name == "float32" else cast(values, name)


def row_errors(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    spec: ScaledWeight,
    workspace: Workspace | None = None,
    *,
    zero_point: Tensor | None = None,
) -> RowErrors:
    """``quantrecipe.formats.error.row_errors`` for the format of ``spec``."""
    return _row_errors(
        weight, codes, scale, get_format(spec), spec, workspace, zero_point=zero_point
    )


def _plain_name(dtype: torch.dtype) -> PlainDType:
    for name, known in PLAIN.items():
        if known == dtype:
            return name
    raise ValueError(f"{dtype} is no plain dtype")
