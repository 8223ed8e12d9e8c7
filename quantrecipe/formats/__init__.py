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
from quantrecipe.formats.ggml import RECORD_FORMATS
from quantrecipe.formats.int4 import Int4Format
from quantrecipe.formats.int8 import Int8Format
from quantrecipe.formats.llm_int8 import LlmInt8Format
from quantrecipe.formats.mx import MxFp4Format, MxFp8Format
from quantrecipe.formats.nf4 import Nf4Format
from quantrecipe.formats.nvfp4 import NvFp4Format
from quantrecipe.formats.plain import PLAIN, cast, to_float32
from quantrecipe.formats.refusals import NonFinite, OutOfRange, ScaleOutOfRange, Unrepresentable
from quantrecipe.formats.two_level import TwoLevelScales, choose_two_levels, effective_scales
from quantrecipe.schema.dtypes import PlainDType
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean
from quantrecipe.schema.schemes import PlainWeight, ScaledWeight
from quantrecipe.schema.storage import AS_IT_IS, Storage

__all__ = [
    "FORMATS",
    "PLAIN",
    "NonFinite",
    "OutOfRange",
    "Quantized",
    "RowErrors",
    "ScaleOutOfRange",
    "TwoLevelScales",
    "Unrepresentable",
    "WeightFormat",
    "Workspace",
    "cast",
    "choose_two_levels",
    "dequantize",
    "effective_scales",
    "get_format",
    "plain_dtype",
    "quantize",
    "row_errors",
    "rows_together",
    "sqnr_db",
    "to_float32",
]

_ALL: Final[tuple[WeightFormat, ...]] = (
    Int8Format(),
    E4M3FN,
    E5M2,
    Int4Format(),
    Nf4Format(),
    LlmInt8Format(),
    MxFp8Format(),
    MxFp4Format(),
    NvFp4Format(),
    *RECORD_FORMATS.values(),
)
FORMATS: Final = MappingProxyType[str, WeightFormat]({fmt.name: fmt for fmt in _ALL})
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


def rows_together(weight: PlainWeight | ScaledWeight, storage: Mapping[str, Storage]) -> int:
    """Rows of a stored weight that must stay together to be encoded or decoded.

    Args:
        weight: how it is stored.
        storage: how its tensors lie, by role; zero points are packed from row to row.
    """
    if isinstance(weight, PlainWeight):
        return 1
    zeros = storage.get("weight_zero_point", AS_IT_IS).packing
    together = 1 if zeros is None else zeros.codes
    tiles = 1 if weight.has_two_levels else storage.get("weight_scale", AS_IT_IS).rows_together
    return math.lcm(get_format(weight).row_multiple(weight), together, tiles)


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
    if spec.has_two_levels:
        stored, scale = choose_two_levels(fmt.measure(values, spec), spec)
        codes = fmt.encode(values, scale, spec, checked=False)
        return Quantized(codes, effective_scales(stored, spec), two_levels=stored)
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
        scale: the canonical grid, of ``effective_scales`` where they have two levels; ``None`` for
            a plain dtype.
        spec: how the weight is stored.
        dtype: rounded to this from float32; a name or torch's dtype.
        zero_point: the canonical grid, for formats that have one.

    Raises:
        InvalidInput: a value is not finite, or too large for ``dtype``.
    """
    name = plain_dtype(dtype)
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


def plain_dtype(dtype: str | torch.dtype) -> PlainDType:
    """The name that recipes give a plain dtype.

    Raises:
        ValueError: it is none.
    """
    for name, known in PLAIN.items():
        if dtype in (name, known):
            return name
    raise ValueError(f"{dtype} does not hold plain numbers")
