"""Numbers that no scale and no smoothing factor can be."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.refusals import first_index
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.tensors import TensorInfo

_SCALE: Final = (
    "bad-scale",
    "scale {}: what it scales is lost",
    "The file is damaged, or was written by a broken tool; convert again.",
)
_WORDS: Final = {
    "smoothing": (
        "bad-smoothing",
        "factor {}: activations cannot be divided by it",
        "Convert again from statistics that were measured.",
    ),
    **dict.fromkeys(("weight_scale", "second_scale", "scale_offset"), _SCALE),
}
JUDGED: Final = frozenset(_WORDS)
"""The roles whose numbers have to be positive and finite."""


def is_good(tensor: Tensor, *, zero: bool = False) -> Tensor:
    """Whether every number is positive (or zero, if that may be) and finite, on the device."""
    return _good(tensor, zero).all()


def bad_number(
    role: str, tensor: Tensor, info: TensorInfo, *, zero: bool = False
) -> Problem | None:
    """What is wrong with scales or smoothing factors, named by the first such number."""
    index = first_index(~_good(tensor, zero))
    if index is None:
        return None
    kind, words, hint = _WORDS[role]
    found = f"{float(tensor[index])} at index {list(index)}"
    return Problem(kind, words.format(found), hint=hint, file=str(info.file), tensor=info.name)


def _good(tensor: Tensor, zero: bool) -> Tensor:
    numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return torch.isfinite(numbers).logical_and_(numbers >= 0 if zero else numbers > 0)
