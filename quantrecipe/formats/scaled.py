"""What formats with codes and scales share: everything but rounding and unpacking."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Final

import torch
from torch import Tensor

from quantrecipe.formats.base import Workspace
from quantrecipe.formats.grid import absmax, tiles
from quantrecipe.formats.refusals import (
    NonFinite,
    ScaleOutOfRange,
    all_finite,
    extremes,
    first_index,
    refuse_non_finite,
)
from quantrecipe.schema.schemes import Float8Block, ScaledWeight

SCALE_DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
}
"""What grids of scales are in, by ``ScaledWeight.grid_dtype``."""


class ScaledFormat(ABC):
    """A ``WeightFormat`` whose codes are ``round(weight / scale)`` on the grid of some dtype.

    Attributes:
        name: the name recipes use.
        code_dtype: the dtype of the codes.
        largest_code: the largest magnitude written.
    """

    name: str
    code_dtype: torch.dtype
    largest_code: float
    _first_non_finite: int = 0x80
    """The smallest magnitude bits that are no number, if any are."""

    @abstractmethod
    def _round(self, ratio: Tensor, zero_point: Tensor | None, group: tuple[int, int]) -> None:
        """Bring ``weight / scale`` in place to values that the cast to ``code_dtype`` finishes."""

    @abstractmethod
    def _unpack(
        self, codes: Tensor, out: Tensor, zero_point: Tensor | None, group: tuple[int, int]
    ) -> None:
        """``levels`` as float32 into ``out``; codes that are no numbers become anything."""

    @abstractmethod
    def _bound(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The bound, from a weight, its scale and zero point, float64 and broadcastable."""

    def operand(self, scale: Tensor) -> Tensor:
        """What weights are divided by, or multiplied by (``_divide``), from float32 scales."""
        return scale

    def _divide(self, weight: Tensor, operand: Tensor, out: Tensor) -> None:
        torch.div(weight, operand, out=out)

    def _multiply(self, values: Tensor, scale: Tensor) -> None:
        """What ``_unpack`` left, times the scales, in place."""
        values.mul_(scale)

    @property
    def _largest_level(self) -> float:
        """The largest ``abs(w_hat) / scale``; int8 sources may hold -128."""
        return self.largest_code + 1

    def _largest_bits(self, codes: Tensor) -> Tensor:
        """The largest magnitude bits of any code, where some stand for no number."""
        return codes.new_zeros((), dtype=torch.int32)

    def _refuse_codes(self, codes: Tensor) -> None:
        """Raise ``NonFinite`` for the first code that is no number; there is one."""
        refuse_codes(codes, ~torch.isfinite(codes.float()))

    def row_multiple(self, spec: ScaledWeight) -> int:
        return spec.block_size[0] if isinstance(spec, Float8Block) else 1

    def measure(self, weight: Tensor, spec: ScaledWeight) -> Tensor:
        check_block(weight, torch.float32, "a weight")
        amax = absmax(weight, spec.group_shape(*weight.shape))
        if not all_finite(amax):
            refuse_non_finite(weight)
        return amax

    def scales(self, amax: Tensor, spec: ScaledWeight) -> Tensor:
        return stored_scales(amax, self.largest_code, spec)

    def zero_points(self, amax: Tensor, scale: Tensor, spec: ScaledWeight) -> Tensor | None:
        return None

    def levels(self, codes: Tensor, zero_point: Tensor | None, group: tuple[int, int]) -> Tensor:
        return codes

    def encode(
        self,
        weight: Tensor,
        scale: Tensor,
        spec: ScaledWeight,
        out: Tensor | None = None,
        *,
        zero_point: Tensor | None = None,
        workspace: Workspace | None = None,
        checked: bool = True,
    ) -> Tensor:
        check_block(weight, torch.float32, "a weight")
        _check_grid(scale, zero_point, weight, spec)
        _check_stored(scale, spec, checked)
        ratio = (workspace or Workspace()).like(weight)
        group = spec.group_shape(*weight.shape)
        for (w, target), each in tiles((weight, ratio), self.operand(scale.float()), group):
            self._divide(w, each, target)
        self._round(ratio, zero_point, group)
        codes = _output(out, weight, self.code_dtype)
        return codes.copy_(ratio)

    def decode(
        self,
        codes: Tensor,
        scale: Tensor,
        spec: ScaledWeight,
        out: Tensor | None = None,
        *,
        zero_point: Tensor | None = None,
        checked: bool = True,
    ) -> Tensor:
        check_block(codes, self.code_dtype, f"{self.name} codes")
        _check_grid(scale, zero_point, codes, spec)
        factors = scale.float()
        values = _output(out, codes, torch.float32)
        group = spec.group_shape(*codes.shape)
        self._unpack(codes, values, zero_point, group)
        for (view,), s in tiles((values,), factors, group):
            self._multiply(view, s)
        if checked:
            self._check_decoded(codes, factors, values)
        return values

    def bound(
        self,
        weight: Tensor,
        codes: Tensor,
        scale: Tensor,
        spec: ScaledWeight,
        *,
        zero_point: Tensor | None = None,
    ) -> Tensor:
        _check_grid(scale, zero_point, weight, spec)
        exact = weight.double()
        result = torch.empty_like(exact)
        group = spec.group_shape(*weight.shape)
        zeros: list[Tensor | None] = [None] * 4  # as many tiles as there can be
        if zero_point is not None:
            zeros = [*(zero for _, zero in tiles((exact,), zero_point.double(), group))]
        for ((w, target), s), zero in zip(
            tiles((exact, result), scale.double(), group), zeros, strict=False
        ):
            target.copy_(self._bound(w, s, zero))
        return result

    def _check_decoded(self, codes: Tensor, factors: Tensor, values: Tensor) -> None:
        # Products are finite wherever this one is, and only a broken source gets beyond it.
        product = factors.abs().amax() * self._largest_level
        # One copy to the host: each waits for all that the device has been given to do.
        bits, largest = torch.stack((self._largest_bits(codes).float(), product)).tolist()
        if bits >= self._first_non_finite:
            self._refuse_codes(codes)
        if not math.isfinite(largest):
            refuse_non_finite(values)


def stored_scales(span: Tensor, steps: float, spec: ScaledWeight) -> Tensor:
    """``span / steps`` as scales are stored; see ``WeightFormat.scales``.

    Args:
        span: what the codes of each group have to reach over, a float32 grid.
        steps: how many steps of the scale that is.
        spec: how the weight is stored.
    """
    check_block(span, torch.float32, "a grid of maxima")
    dtype = SCALE_DTYPES[spec.scale_dtype]
    # A tensor on the same device: torch may multiply by the reciprocal of a Python number.
    divisor = span.new_full((), steps)
    floored = torch.div(span, divisor).clamp_(min=torch.finfo(dtype).smallest_normal)
    stored = floored.to(dtype).masked_fill_(span == 0, 1.0)
    if not all_finite(stored):
        index = first_index(~torch.isfinite(stored))
        assert index is not None
        wanted = float(span[index]) / steps
        raise ScaleOutOfRange(f"scale {wanted!r} is too large for {spec.scale_dtype}", index)
    return stored


def refuse_codes(codes: Tensor, none: Tensor) -> None:
    """Raise ``NonFinite`` for the first code for which ``none`` is true: it is no number."""
    index = first_index(none)
    if index is not None:
        pattern = int(codes[index].view(torch.uint8))
        raise NonFinite(f"the {str(codes.dtype)[6:]} code 0x{pattern:02x}, no number,", index)


def check_block(block: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raise ``ValueError`` for what is no non-empty 2-D tensor of ``dtype``."""
    if block.ndim != 2 or block.dtype != dtype or not block.numel():
        raise ValueError(
            f"{what} must be a non-empty 2-D tensor of {dtype}, "
            f"not {list(block.shape)} of {block.dtype}"
        )


def _check_grid(
    scale: Tensor, zero_point: Tensor | None, block: Tensor, spec: ScaledWeight
) -> None:
    expected = spec.scale_grid(*block.shape)
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"a block {list(block.shape)} has scales {list(expected)}, not {list(scale.shape)}"
        )
    if (zero_point is not None) != spec.has_zero_points:
        have = "need" if spec.has_zero_points else "have no"
        raise ValueError(f"weights in this {spec.format} {have} zero points")
    if zero_point is not None and (
        zero_point.dtype != torch.uint8 or tuple(zero_point.shape) != expected
    ):
        raise ValueError(
            f"a block {list(block.shape)} has zero points {list(expected)} of uint8, "
            f"not {list(zero_point.shape)} of {zero_point.dtype}"
        )


def _check_stored(scale: Tensor, spec: ScaledWeight, look: bool) -> None:
    if scale.dtype != SCALE_DTYPES[spec.grid_dtype]:
        raise ValueError(f"scales are given as {spec.grid_dtype}, not {scale.dtype}")
    if not look:
        return
    low, high = extremes(scale.float())
    if not (low > 0 or (spec.has_zero_scales and low == 0)) or not high < math.inf:
        raise ValueError("scales must be positive and finite")


def _output(out: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    if out is None:
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    if out.shape != like.shape or out.dtype != dtype:
        raise ValueError(
            f"out must be {list(like.shape)} of {dtype}, not {list(out.shape)} of {out.dtype}"
        )
    return out
