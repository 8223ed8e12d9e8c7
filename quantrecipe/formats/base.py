"""What a numeric format does: one protocol, and the scratch memory it works in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from quantrecipe.schema.schemes import ScaledWeight

if TYPE_CHECKING:
    from quantrecipe.formats.two_level import TwoLevelScales


@dataclass(frozen=True, slots=True)
class Quantized:
    """A whole weight as stored.

    Attributes:
        codes: ``[out, spec.code_columns(in)]``, in the format's code dtype.
        scale: the canonical grid ``spec.scale_grid(out, in)`` in ``spec.grid_dtype``, which codes
            are decoded with; ``None`` for a plain dtype.
        zero_point: uint8 of the shape of ``scale``, the code that stands for 0 in each group;
            ``None`` where the format has none.
        two_levels: what is stored in the place of ``scale``, for formats with two levels of scales.
    """

    codes: Tensor
    scale: Tensor | None
    zero_point: Tensor | None = None
    two_levels: TwoLevelScales | None = None


class Workspace:
    """float32 scratch that grows to the largest block it has seen, then allocates no more.

    One a thread: two calls must not share it at the same time.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def like(self, block: Tensor) -> Tensor:
        """Uninitialized float32 of the shape and on the device of ``block``.

        The same memory is handed out on every call.
        """
        return self.shaped(tuple(block.shape), block.device)

    def shaped(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Uninitialized float32 of this shape on this device, in the same memory as ``like``."""
        buffer, count = self._buffer, math.prod(shape)
        if buffer is None or buffer.numel() < count or buffer.device != device:
            buffer = torch.empty(count, dtype=torch.float32, device=device)
            self._buffer = buffer
        return buffer[:count].view(shape)


class WeightFormat(Protocol):
    """Codes and scales for row blocks of a weight.

    A block is float32 ``[rows, in]``: the whole weight or any run of its rows that begins at a
    multiple of ``row_multiple``. Its scales are the rows of the canonical grid that belong to it.
    Nothing that is returned depends on how a weight is cut into blocks. For granularity ``tensor``
    the caller takes the maximum of ``measure`` over all blocks before it asks for ``scales``.
    """

    @property
    def name(self) -> str:
        """The name recipes use."""

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype of the codes."""

    @property
    def largest_code(self) -> float:
        """The largest magnitude that ``encode`` writes."""

    def row_multiple(self, spec: ScaledWeight) -> int:
        """Blocks must begin at multiples of this many rows."""

    def measure(self, weight: Tensor, spec: ScaledWeight) -> Tensor:
        """The absolute maximum of each scaling group, a float32 grid.

        For weights with zero points ``[2, *grid]``: the smallest and the largest number of each
        group, with 0 between them.

        Raises:
            NonFinite: the block holds a NaN or an infinity; carries its row and column.
        """

    def scales(self, amax: Tensor, spec: ScaledWeight) -> Tensor:
        """The scales as stored: ``amax / largest_code``, from float32 to ``spec.scale_dtype``.

        With zero points, ``high - low`` divided by the number of steps between codes. A group of
        zeros has scale 1. A scale below the smallest normal number of its dtype is that number, so
        a scale is never zero and dividing by it loses nothing. nf4 and llm_int8 have scales of
        their own: the absolute maximum, whatever it is; those of mxfp8 and mxfp4 are powers of two.

        Where scales have two levels this is the float32 grid to encode with, from the maxima of
        the whole weight; ``two_level.choose_two_levels`` says how it is stored.

        Raises:
            ScaleOutOfRange: a scale overflows its dtype; carries its row and column in the grid.
        """

    def zero_points(self, amax: Tensor, scale: Tensor, spec: ScaledWeight) -> Tensor | None:
        """The zero points of groups with these ``scales``, uint8 of the same shape.

        ``None`` for weights without zero points.
        """

    def levels(self, codes: Tensor, zero_point: Tensor | None, group: tuple[int, int]) -> Tensor:
        """What codes stand for before they are multiplied by their scales.

        In the smallest dtype that holds it: the codes themselves for int8 and fp8, int8 for int4,
        float32 for nf4, fp4 codes and llm_int8 (where times scales they are rounded otherwise than
        by ``decode``, in the last places).
        """

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
        """Codes from the scales as stored, by a true float32 division ``weight / scale``.

        The block must have passed ``measure``. ``out`` receives the codes where it is given.
        ``checked`` is false for scales that come from ``scales``: looking at them would wait for
        the device they are on.

        Raises:
            ValueError: scales that are not ``spec``'s grid, dtype, or positive and finite; zero
                points that are missing, misshaped, or not asked for.
        """

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
        """``float32(levels) * float32(scale)``, for scales of any floating dtype.

        ``checked`` is false for codes that come from ``encode``, as above.

        Raises:
            NonFinite: a code, a scale or a product is no finite number; carries row and column.
        """

    def bound(
        self,
        weight: Tensor,
        codes: Tensor,
        scale: Tensor,
        spec: ScaledWeight,
        *,
        zero_point: Tensor | None = None,
    ) -> Tensor:
        """What ``abs(weight - decode(codes, scale))`` cannot exceed, float64 ``[rows, in]``.

        It follows from the scales as stored; float32 arithmetic is allowed for.
        """
