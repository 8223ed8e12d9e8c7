"""``BlockTransform`` into records of ggml: a few rows at a time, in compiled loops.

All steps of some rows are taken while they are in a core's cache. What must be refused is left to
the plain transform, which knows which number it is.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.error import RowErrors
from quantrecipe.formats.kernels import takes
from quantrecipe.formats.records import RecordFormat
from quantrecipe.formats.refusals import Unrepresentable
from quantrecipe.schema.schemes import ScaledWeight

if TYPE_CHECKING:
    from quantrecipe.formats.plain_transform import PlainTransform

_AT_A_TIME: Final = 1 << 17


class RecordTransform:
    """``BlockTransform`` for targets in records, for tensors in the CPU's memory.

    Args:
        plain: the same transform, for its first steps and for what this one does not take.
        loops: ``quantrecipe.formats.compiled_blocks``.
        kernels: ``quantrecipe.formats.compiled``.
    """

    def __init__(self, plain: PlainTransform, loops: ModuleType, kernels: ModuleType) -> None:
        assert isinstance(plain.format, RecordFormat)
        self._plain = plain
        self._format = plain.format
        self._absmax = loops.absmax
        self._squares = kernels.squares
        self.absmax = plain.absmax
        self.column_absmax = plain.column_absmax

    def __call__(
        self, source: SourceBlock, target: TargetBlock, importance: Tensor | None = None
    ) -> RowErrors:
        found = self._rows(source, target.codes)
        return self._plain(source, target, importance) if found is None else found

    def _rows(self, source: SourceBlock, codes: Tensor) -> RowErrors | None:
        """All there is to do, or ``None`` if the plain path shall look at it."""
        if isinstance(self._plain.source, ScaledWeight) or source.codes.device.type != "cpu":
            return None
        rows, columns = source.codes.shape
        shape = rows, self._format.code_columns(columns)
        if not takes(codes, torch.uint8, shape):
            return None
        signal, noise, worst = np.empty(rows), np.empty(rows), np.float32(0)
        step = max(1, _AT_A_TIME // columns)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            try:
                weight = self._plain.decode(replace(source, codes=source.codes[part]))
                self._format.measure(weight, self._plain.target)
            except Unrepresentable:
                return None
            numbers = weight.numpy()
            self._squares(numbers, signal[part])
            largest = self._largest(weight)
            self._format.encode(weight, weight.new_empty(0), self._plain.target, codes[part])
            error = self._format.decode(
                codes[part], weight.new_empty(0), self._plain.target, checked=False
            ).sub_(weight)
            self._squares(error.numpy(), noise[part])
            largest[largest == 0] = 1
            worst = max(worst, (self._largest(error) / largest).max())
        if not np.isfinite(worst):
            return None
        return RowErrors(torch.from_numpy(signal), torch.from_numpy(noise), float(worst))

    def _largest(self, values: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """The largest magnitude of the numbers of each record."""
        runs = values.view(-1, self._format.numbers).numpy()
        found = np.empty(len(runs), np.float32)
        self._absmax(runs, found)
        return found
