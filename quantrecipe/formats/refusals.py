"""What a format refuses: a number that it cannot hold, named by where it stands."""

from __future__ import annotations

import math

import torch

from quantrecipe.schema.problems import InvalidInput, Problem


class Unrepresentable(InvalidInput):
    """A value has no encoding.

    Attributes:
        index: where it stands in the tensor that was handed over (a row block of a weight:
            row, column; a grid of scales: the scale's row and column).
    """

    kind = "unrepresentable"
    hint: str | None = None

    def __init__(self, what: str, index: tuple[int, ...]) -> None:
        self.what = what
        self.index = index
        super().__init__(self.at())

    def at(self, tensor: str | None = None, first_row: int = 0) -> Problem:
        """The problem, for a block that begins at row ``first_row`` of ``tensor``."""
        index = (self.index[0] + first_row, *self.index[1:]) if self.index else ()
        return Problem(
            kind=self.kind,
            message=f"{self.what} at index {list(index)}",
            hint=self.hint,
            tensor=tensor,
        )


class NonFinite(Unrepresentable):
    """A NaN or an infinity where a number is needed."""

    kind = "non-finite"
    hint = "Repair the source, or protect the module in its own dtype to carry its bytes over."


class OutOfRange(Unrepresentable):
    """A finite value that the dtype asked for would turn into an infinity."""

    kind = "out-of-range"
    hint = "Choose a dtype with more range (bfloat16 has float32's)."


class ScaleOutOfRange(Unrepresentable):
    """A scale too large for the dtype that scales are stored in."""

    kind = "scale-out-of-range"
    hint = "Choose scale_dtype float32 or bfloat16."


def refuse_non_finite(tensor: torch.Tensor) -> None:
    """Raise ``NonFinite`` for the first NaN or infinity of ``tensor``, in row-major order.

    Slow: callers find out cheaply that there is one before they ask which.
    """
    index = first_index(~torch.isfinite(tensor))
    if index is not None:
        raise NonFinite(_words(float(tensor[index])), index)


def refuse_cast(source: torch.Tensor, result: torch.Tensor) -> None:
    """Raise for the first value of ``result`` that is not finite: overflowed, or never was."""
    index = first_index(~torch.isfinite(result))
    if index is None:
        return
    value = float(source[index])
    if torch.isfinite(source[index]):
        name = str(result.dtype).removeprefix("torch.")
        raise OutOfRange(f"{value!r} is too large for {name}", index)
    raise NonFinite(_words(value), index)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` holds neither a NaN nor an infinity, in one pass."""
    if not tensor.numel():
        return True
    return all(map(math.isfinite, extremes(tensor)))


def extremes(tensor: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest number, or NaNs, in one pass and one copy from the device."""
    low, high = torch.stack(torch.aminmax(tensor)).tolist()
    return low, high


def first_index(mask: torch.Tensor) -> tuple[int, ...] | None:
    """The first true element of ``mask`` in row-major order."""
    found = mask.nonzero()
    return tuple(int(i) for i in found[0]) if len(found) else None


def _words(value: float) -> str:
    return "a NaN" if value != value else f"an infinity ({value})"
