"""Plain dtypes: numbers without a scale, rounded to nearest, ties to even.

A dtype that does not change is a copy: every bit pattern is kept, NaNs and infinities too. A dtype
that changes is a computation: a NaN or an infinity in the source is refused, even where the target
could hold it, and so is a finite value that would become an infinity. float64 goes to a 16-bit
dtype through float32 (two roundings), as every weight here is taken to float32 first.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.refusals import all_finite, refuse_cast
from quantrecipe.schema.dtypes import PlainDType

PLAIN: Final[dict[PlainDType, torch.dtype]] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def cast(source: Tensor, dtype: PlainDType, out: Tensor | None = None) -> Tensor:
    """``source`` in another plain dtype, in ``out`` or in a new tensor; never ``source`` itself.

    Args:
        source: a tensor of a plain dtype, of any shape.
        dtype: the dtype asked for.
        out: where the result goes; of that dtype and ``source``'s shape.

    Raises:
        NonFinite: the dtype changes and ``source`` holds a NaN or an infinity.
        OutOfRange: a finite value is too large for ``dtype``.
        ValueError: ``source`` is of no plain dtype (codes need their scale), or ``out`` does not
            fit.
    """
    target = PLAIN[dtype]
    if source.dtype not in PLAIN.values():
        raise ValueError(f"{source.dtype} is no plain dtype: decode it with its scale")
    result = _output(out, source, target)
    if source.dtype == target:
        return result.copy_(source)
    if source.dtype == torch.float64 and target != torch.float32:
        result.copy_(source.float())
    else:
        result.copy_(source)
    if not all_finite(result):
        refuse_cast(source, result)
    return result


def to_float32(source: Tensor, out: Tensor | None = None) -> Tensor:
    """A weight of any plain dtype as the float32 that formats compute in.

    Only float64 is looked at. The others fit, NaNs and infinities come through, and ``measure``
    refuses those: one pass is enough. float32 itself is copied only into ``out``.

    Raises:
        NonFinite: float64 ``source`` holds a NaN or an infinity.
        OutOfRange: a float64 value is too large for float32.
        ValueError: ``source`` is of no plain dtype, or ``out`` does not fit.
    """
    if source.dtype not in (torch.float16, torch.bfloat16):
        return (
            source
            if source.dtype == torch.float32 and out is None
            else cast(source, "float32", out)
        )
    return _output(out, source, torch.float32).copy_(source)


def _output(out: Tensor | None, source: Tensor, dtype: torch.dtype) -> Tensor:
    if out is None:
        return torch.empty(source.shape, dtype=dtype, device=source.device)
    if out.shape != source.shape or out.dtype != dtype:
        raise ValueError(
            f"out must be {list(source.shape)} of {dtype}, not {list(out.shape)} of {out.dtype}"
        )
    return out
