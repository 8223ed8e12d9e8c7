"""``BlockTransform`` for formats with scales of short runs: steps in torch, runs in compiled loops.

A few rows at a time are decoded by the plain steps of any source; maxima, codes, errors and sums of
squares are compiled (``compiled_blocks``, ``compiled``), scales are chosen by the format itself.
What must be refused is left to the plain transform, which knows which number it is.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from quantrecipe.formats import get_format
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.error import RowErrors
from quantrecipe.formats.int4 import Int4Format
from quantrecipe.formats.kernels import takes
from quantrecipe.formats.refusals import Unrepresentable, extremes
from quantrecipe.formats.scaled import ScaledFormat
from quantrecipe.schema.schemes import AnyScaledWeight, ClipSearch, ScaledWeight

if TYPE_CHECKING:
    from quantrecipe.formats.transform import PlainTransform

# Numbers that stay in a core's second cache, as float32 and as codes.
_AT_A_TIME: Final = 1 << 18


def covers(target: AnyScaledWeight, loops: ModuleType) -> bool:
    """Whether ``BlockwiseTransform`` writes this format."""
    return target.format in loops.ENCODERS and not isinstance(target.quantizer, ClipSearch)


class BlockwiseTransform:
    """``BlockTransform`` for what ``covers`` says, for tensors in the CPU's memory.

    Args:
        plain: the same transform, for its first steps and for what this one does not take.
        loops: ``quantrecipe.formats.compiled_blocks``.
        kernels: ``quantrecipe.formats.compiled``.
    """

    def __init__(self, plain: PlainTransform, loops: ModuleType, kernels: ModuleType) -> None:
        self._plain = plain
        self._loops = loops
        self._squares = kernels.squares
        self._target = plain.target
        fmt = get_format(plain.target)
        assert isinstance(fmt, ScaledFormat)
        self._format = fmt

    def __call__(
        self,
        codes_in: Tensor,
        scales_in: Tensor | None,
        factors: Tensor | None,
        codes_out: Tensor,
        scales_out: Tensor,
        importance: Tensor | None = None,
        *,
        zeros_in: Tensor | None = None,
        zeros_out: Tensor | None = None,
        encode_scales: Tensor | None = None,
    ) -> RowErrors:
        block = codes_in, scales_in, factors, zeros_in
        by = scales_out if encode_scales is None else encode_scales
        found = None
        if self._takes(codes_in, codes_out, scales_out, zeros_out, by):
            found = self._rows(block, codes_out, scales_out, zeros_out, by)
        if found is not None:
            return found
        return self._plain(
            codes_in,
            scales_in,
            factors,
            codes_out,
            scales_out,
            importance,
            zeros_in=zeros_in,
            zeros_out=zeros_out,
            encode_scales=encode_scales,
        )

    def absmax(
        self,
        codes_in: Tensor,
        scales_in: Tensor | None,
        factors: Tensor | None,
        *,
        zeros_in: Tensor | None = None,
    ) -> Tensor:
        block = codes_in, scales_in, factors, zeros_in
        if _on_cpu(codes_in):
            found = []
            for part in self._parts(block):
                weight = self._decoded(block, part)
                amax = None if weight is None else self._measured(weight)
                if amax is None:
                    break
                found.append(amax)
            else:
                return torch.cat(found, dim=-2)
        return self._plain.absmax(codes_in, scales_in, factors, zeros_in=zeros_in)

    def column_absmax(
        self,
        codes_in: Tensor,
        scales_in: Tensor | None,
        out: Tensor,
        *,
        zeros_in: Tensor | None = None,
    ) -> None:
        self._plain.column_absmax(codes_in, scales_in, out, zeros_in=zeros_in)

    def _takes(
        self,
        codes_in: Tensor,
        codes_out: Tensor,
        scales_out: Tensor,
        zeros_out: Tensor | None,
        by: Tensor,
    ) -> bool:
        """Whether the loops, which check nothing, may be given the memory of these."""
        target = self._target
        if not _on_cpu(codes_in) or codes_out.ndim != 2 or len(codes_out) != len(codes_in):
            return False
        shape = tuple(codes_out.shape)
        grid, dtype = target.scale_grid(*shape), TORCH_DTYPES[target.grid_dtype]
        if not takes(codes_out, self._format.code_dtype, shape):
            return False
        if not takes(scales_out, dtype, grid) or not takes(by, dtype, grid):
            return False
        if (zeros_out is not None) != target.has_zero_points:
            return False
        if zeros_out is not None and not takes(zeros_out, torch.uint8, grid):
            return False
        if not target.scales_together:
            return by is scales_out
        low, high = extremes(by)
        return (low > 0 or (low == 0 and target.has_zero_scales)) and high < float("inf")

    def _rows(
        self,
        block: _Block,
        codes_out: Tensor,
        scales_out: Tensor,
        zeros_out: Tensor | None,
        by: Tensor,
    ) -> RowErrors | None:
        """All there is to do, a few rows at a time; ``None`` if the plain path shall look at it."""
        rows, columns = codes_out.shape
        signal, noise = np.empty(rows), np.empty(rows)
        worst = 0
        for part in self._parts(block):
            weight = self._decoded(block, part)
            if weight is None or weight.shape[1] != columns:
                return None
            zeros = None if zeros_out is None else zeros_out[part]
            if not self._target.scales_together and not self._choose(
                weight, scales_out[part], zeros
            ):
                return None
            numbers = weight.numpy()
            self._squares(numbers, signal[part])
            scales = scales_out[part]
            found = self._encode(
                weight,
                scales if by is scales_out else by[part],
                scales,
                zeros,
                codes_out[part],
            )
            worst = max(worst, found)
            self._squares(numbers, noise[part])
        largest = float(np.int32(worst).view(np.float32))
        # An infinite error: a code times its scale is beyond float32, or no number was encoded.
        if not largest < float("inf"):
            return None
        return RowErrors(torch.from_numpy(signal), torch.from_numpy(noise), largest)

    def _parts(self, block: _Block) -> list[slice]:
        """Runs of rows that are worked on together; none cuts a scaling group of the source."""
        codes, source = block[0], self._plain.source
        step = max(1, _AT_A_TIME // codes.shape[1])
        if isinstance(source, ScaledWeight) and source.granularity != "tensor":
            height = source.group_shape(*codes.shape)[0]
            step = -(-step // height) * height
        return [slice(first, first + step) for first in range(0, len(codes), step)]

    def _decoded(self, block: _Block, part: slice) -> Tensor | None:
        """Rows of the source as float32, which may be overwritten; ``None`` if one is refused."""
        codes, scales, factors, zeros = block
        source, grid = self._plain.source, part
        if isinstance(source, ScaledWeight):
            height = source.group_shape(*codes.shape)[0]
            if source.granularity == "tensor":
                grid = slice(None)
            else:
                grid = slice(part.start // height, -(-part.stop // height))
        try:
            return self._plain.decode(
                codes[part],
                None if scales is None else scales[grid],
                factors,
                None if zeros is None else zeros[grid],
            )
        except Unrepresentable:
            return None

    def _measured(self, weight: Tensor) -> Tensor | None:
        """What the format's ``measure`` says, or ``None`` if it would refuse a number."""
        target = self._target
        shape = target.scale_grid(*weight.shape)
        runs = self._runs(weight)
        if target.has_zero_points:
            found = torch.empty((2, *shape))
            low, high = (grid.view(-1).numpy() for grid in found)
            fine = self._loops.extremes(runs, low, high)
        else:
            found = torch.empty(shape)
            fine = self._loops.absmax(runs, found.view(-1).numpy())
        return found if fine else None

    def _choose(self, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> bool:
        """Choose scales and zero points; false if there are none."""
        amax = self._measured(weight)
        if amax is None:
            return False
        try:
            chosen = self._format.scales(amax, self._target)
        except Unrepresentable:
            return False
        # As bytes: there is no fast copy of e8m0.
        scales.view(torch.uint8).copy_(chosen.view(torch.uint8))
        found = self._format.zero_points(amax, chosen, self._target)
        if zeros is not None and found is not None:
            zeros.copy_(found)
        return True

    def _encode(
        self, weight: Tensor, by: Tensor, scales: Tensor, zeros: Tensor | None, codes: Tensor
    ) -> int:
        """Codes; leaves errors in ``weight``. Returns the largest in scales, as bits."""
        fmt = self._format
        values = scales.float()
        given: list[Any] = [fmt.operand(values if by is scales else by.float()), values]
        if isinstance(fmt, Int4Format):
            given.append(fmt.middle(scales, zeros))
        arguments = [grid.reshape(-1).numpy() for grid in given]
        if isinstance(fmt, Int4Format):
            arguments.append(np.float32(fmt.first(self._target)))
        encode = self._loops.ENCODERS[self._target.format]
        return int(encode(self._runs(weight), *arguments, self._runs(codes.view(torch.uint8))))

    def _runs(self, block: Tensor) -> Any:
        """The numbers of a block of rows, group after group."""
        return block.view(-1, self._target.group_shape(*block.shape)[1]).numpy()


_Block = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _on_cpu(codes: Tensor) -> bool:
    return codes.ndim == 2 and bool(codes.numel()) and codes.device.type == "cpu"
