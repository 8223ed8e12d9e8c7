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
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.error import RowErrors
from quantrecipe.formats.int4 import Int4Format
from quantrecipe.formats.kernels import takes
from quantrecipe.formats.refusals import Unrepresentable, extremes
from quantrecipe.formats.scaled import ScaledFormat
from quantrecipe.schema.schemes import AnyScaledWeight, ClipSearch, ScaledWeight

if TYPE_CHECKING:
    from quantrecipe.formats.plain_transform import PlainTransform

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
        self.column_absmax = plain.column_absmax

    def __call__(
        self, source: SourceBlock, target: TargetBlock, importance: Tensor | None = None
    ) -> RowErrors:
        found = self._rows(source, target) if self._takes(source.codes, target) else None
        return self._plain(source, target, importance) if found is None else found

    def absmax(self, source: SourceBlock) -> Tensor:
        if _on_cpu(source.codes):
            found = []
            for part in self._parts(source.codes):
                weight = self._decoded(source, part)
                amax = None if weight is None else self._measured(weight)
                if amax is None:
                    break
                found.append(amax)
            else:
                return torch.cat(found, dim=-2)
        return self._plain.absmax(source)

    def _takes(self, codes_in: Tensor, target: TargetBlock) -> bool:
        """Whether the loops, which check nothing, may be given the memory of these."""
        spec, codes, zeros = self._target, target.codes, target.zeros
        if not _on_cpu(codes_in) or codes.ndim != 2 or len(codes) != len(codes_in):
            return False
        shape = tuple(codes.shape)
        grid, dtype = spec.scale_grid(*shape), TORCH_DTYPES[spec.grid_dtype]
        if not takes(codes, self._format.code_dtype, shape):
            return False
        if not takes(target.scales, dtype, grid) or not takes(target.encoding, dtype, grid):
            return False
        if (zeros is not None) != spec.has_zero_points:
            return False
        if zeros is not None and not takes(zeros, torch.uint8, grid):
            return False
        if not spec.scales_together:
            return target.encoding is target.scales
        low, high = extremes(target.encoding)
        return (low > 0 or (low == 0 and spec.has_zero_scales)) and high < float("inf")

    def _rows(self, source: SourceBlock, target: TargetBlock) -> RowErrors | None:
        """All there is to do, a few rows at a time; ``None`` if the plain path shall look at it."""
        rows, columns = target.codes.shape
        signal, noise = np.empty(rows), np.empty(rows)
        worst = 0
        for part in self._parts(source.codes):
            weight = self._decoded(source, part)
            if weight is None or weight.shape[1] != columns:
                return None
            scales = target.scales[part]
            zeros = None if target.zeros is None else target.zeros[part]
            if not self._target.scales_together and not self._choose(weight, scales, zeros):
                return None
            numbers = weight.numpy()
            self._squares(numbers, signal[part])
            by = scales if target.encode_scales is None else target.encode_scales[part]
            found = self._encode(weight, by, scales, zeros, target.codes[part])
            worst = max(worst, found)
            self._squares(numbers, noise[part])
        largest = float(np.int32(worst).view(np.float32))
        # An infinite error: a code times its scale is beyond float32, or no number was encoded.
        if not largest < float("inf"):
            return None
        return RowErrors(torch.from_numpy(signal), torch.from_numpy(noise), largest)

    def _parts(self, codes: Tensor) -> list[slice]:
        """Runs of rows that are worked on together; none cuts a scaling group of the source."""
        source = self._plain.source
        step = max(1, _AT_A_TIME // codes.shape[1])
        if isinstance(source, ScaledWeight) and source.granularity != "tensor":
            height = source.group_shape(*codes.shape)[0]
            step = -(-step // height) * height
        return [slice(first, first + step) for first in range(0, len(codes), step)]

    def _decoded(self, block: SourceBlock, part: slice) -> Tensor | None:
        """Rows of the source as float32, which may be overwritten; ``None`` if one is refused."""
        codes, scales, zeros = block.codes, block.scales, block.zeros
        source, grid = self._plain.source, part
        if isinstance(source, ScaledWeight):
            height = source.group_shape(*codes.shape)[0]
            if source.granularity == "tensor":
                grid = slice(None)
            else:
                grid = slice(part.start // height, -(-part.stop // height))
        rows = SourceBlock(
            codes[part],
            None if scales is None else scales[grid],
            None if zeros is None else zeros[grid],
            block.factors,
        )
        try:
            return self._plain.decode(rows)
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


def _on_cpu(codes: Tensor) -> bool:
    return codes.ndim == 2 and bool(codes.numel()) and codes.device.type == "cpu"
