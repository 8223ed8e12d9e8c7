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
}


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
    def _round(self, ratio: Tensor) -> None:
        """Bring ``weight / scale`` in place to values that the cast to ``code_dtype`` finishes."""

    @abstractmethod
    def _unpack(self, codes: Tensor, out: Tensor) -> None:
        """``float32(codes)`` into ``out``; codes that are no numbers become anything."""

    def _largest_bits(self, codes: Tensor) -> Tensor:
        """The largest magnitude bits of any code, where some stand for no number."""
        return codes.new_zeros((), dtype=torch.int32)

    @abstractmethod
    def _bound(self, magnitude: Tensor, scale: Tensor) -> Tensor:
        """The bound, from ``abs(weight)`` and its scale, float64 and broadcastable."""

    def row_multiple(self, spec: ScaledWeight) -> int:
        return spec.block_size[0] if isinstance(spec, Float8Block) else 1

    def measure(self, weight: Tensor, spec: ScaledWeight) -> Tensor:
        _check_block(weight, torch.float32, "a weight")
        amax = absmax(weight, spec.group_shape(*weight.shape))
        if not all_finite(amax):
            refuse_non_finite(weight)
        return amax

    def scales(self, amax: Tensor, spec: ScaledWeight) -> Tensor:
        _check_block(amax, torch.float32, "a grid of maxima")
        dtype = SCALE_DTYPES[spec.scale_dtype]
        # A tensor on the same device: torch may multiply by the reciprocal of a Python number.
        divisor = amax.new_full((), self.largest_code)
        floored = torch.div(amax, divisor).clamp_(min=torch.finfo(dtype).smallest_normal)
        stored = floored.to(dtype).masked_fill_(amax == 0, 1.0)
        if not all_finite(stored):
            index = first_index(~torch.isfinite(stored))
            assert index is not None
            wanted = float(amax[index]) / self.largest_code
            raise ScaleOutOfRange(f"scale {wanted!r} is too large for {spec.scale_dtype}", index)
        return stored

    def encode(
        self,
        weight: Tensor,
        scale: Tensor,
        spec: ScaledWeight,
        out: Tensor | None = None,
        *,
        workspace: Workspace | None = None,
        checked: bool = True,
    ) -> Tensor:
        _check_block(weight, torch.float32, "a weight")
        _check_grid(scale, weight, spec)
        _check_stored(scale, spec, checked)
        ratio = (workspace or Workspace()).like(weight)
        group = spec.group_shape(*weight.shape)
        for (w, target), s in tiles((weight, ratio), scale.float(), group):
            torch.div(w, s, out=target)
        self._round(ratio)
        codes = _output(out, weight, self.code_dtype)
        return codes.copy_(ratio)

    def decode(
        self,
        codes: Tensor,
        scale: Tensor,
        spec: ScaledWeight,
        out: Tensor | None = None,
        *,
        checked: bool = True,
    ) -> Tensor:
        _check_block(codes, self.code_dtype, f"{self.name} codes")
        _check_grid(scale, codes, spec)
        factors = scale.float()
        values = _output(out, codes, torch.float32)
        self._unpack(codes, values)
        for (view,), s in tiles((values,), factors, spec.group_shape(*codes.shape)):
            view.mul_(s)
        if checked:
            self._check_decoded(codes, factors, values)
        return values

    def bound(self, weight: Tensor, codes: Tensor, scale: Tensor, spec: ScaledWeight) -> Tensor:
        _check_grid(scale, weight, spec)
        magnitude = weight.double().abs_()
        result = torch.empty_like(magnitude)
        group = spec.group_shape(*weight.shape)
        for (w, target), s in tiles((magnitude, result), scale.double(), group):
            target.copy_(self._bound(w, s))
        return result

    def _check_decoded(self, codes: Tensor, factors: Tensor, values: Tensor) -> None:
        # Products are finite wherever this one is, and only a broken source gets beyond it. int8
        # sources may hold -128.
        product = factors.abs().amax() * (self.largest_code + 1)
        # One copy to the host: each waits for all that the device has been given to do.
        bits, largest = torch.stack((self._largest_bits(codes).float(), product)).tolist()
        if bits >= self._first_non_finite:
            refuse_codes(codes, codes.float())
        if not math.isfinite(largest):
            refuse_non_finite(values)


def refuse_codes(codes: Tensor, as_float: Tensor) -> None:
    """Raise ``NonFinite`` for the first code that is a NaN or an infinity in ``as_float``."""
    index = first_index(~torch.isfinite(as_float))
    if index is not None:
        pattern = int(codes[index].view(torch.uint8))
        raise NonFinite(f"the {str(codes.dtype)[6:]} code 0x{pattern:02x}, no number,", index)


def _check_block(block: Tensor, dtype: torch.dtype, what: str) -> None:
    if block.ndim != 2 or block.dtype != dtype or not block.numel():
        raise ValueError(
            f"{what} must be a non-empty 2-D tensor of {dtype}, "
            f"not {list(block.shape)} of {block.dtype}"
        )


def _check_grid(scale: Tensor, block: Tensor, spec: ScaledWeight) -> None:
    expected = spec.scale_grid(*block.shape)
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"a block {list(block.shape)} has scales {list(expected)}, not {list(scale.shape)}"
        )


def _check_stored(scale: Tensor, spec: ScaledWeight, look: bool) -> None:
    if scale.dtype != SCALE_DTYPES[spec.scale_dtype]:
        raise ValueError(f"scales are stored as {spec.scale_dtype}, not {scale.dtype}")
    if not look:
        return
    low, high = extremes(scale)
    if not 0 < low <= high < math.inf:
        raise ValueError("scales must be positive and finite")


def _output(out: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    if out is None:
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    if out.shape != like.shape or out.dtype != dtype:
        raise ValueError(
            f"out must be {list(like.shape)} of {dtype}, not {list(out.shape)} of {out.dtype}"
        )
    return out
