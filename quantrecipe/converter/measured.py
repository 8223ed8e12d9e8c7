"""What a statistics file says of the inputs of modules."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from quantrecipe.checkpoint import SourceReader, read_header
from quantrecipe.converter.source_rows import read_slice
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.refusals import first_index
from quantrecipe.schema.plan import PlannedModule
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.tensors import TensorInfo


def statistics_tensor(
    module: PlannedModule, measured: Container[str], what: str = "input_absmax"
) -> str:
    """The name of something measured of a module in a statistics file.

    Where a target layout renames or splits a module, that may be of the source's module: its pieces
    have the same input.

    Args:
        module: the module.
        measured: the tensors that the file has.
        what: which.
    """
    own = f"{module.part}/{module.name}/{what}"
    original = module.source.renamed_from
    if original is None or own in measured:
        return own
    return f"{module.part}/{original}/{what}"


class Measured:
    """A statistics file that is open, its tensors already held against the plan.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._header = read_header(path)
        self._reader = SourceReader([self._header])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reader.close()

    def input_absmax(self, modules: Sequence[PlannedModule]) -> Tensor:
        """The largest absolute input of each channel of siblings, over all bins, float32 ``[in]``.

        Raises:
            InvalidInput: a maximum is negative or no finite number: it was not measured.
        """
        return torch.stack([self._absmax(module) for module in modules]).amax(0)

    def input_tokens(self, modules: Sequence[PlannedModule]) -> tuple[Tensor, TensorInfo]:
        """The tokens that are kept of the first sibling that has any, and where they are from.

        Returns:
            float32 ``[tokens, in]``, and the tensor of the file.

        Raises:
            InvalidInput: one of their numbers is not finite.
        """
        names = [statistics_tensor(m, self._header.tensors, "input_tokens") for m in modules]
        info = next(self._header.tensors[name] for name in names if name in self._header.tensors)
        values = self._read(info).float()
        _refuse(info, values, values.isfinite(), "is no number of an input")
        return values, info

    def _absmax(self, module: PlannedModule) -> Tensor:
        info = self._header.tensors[statistics_tensor(module, self._header.tensors)]
        values = self._read(info)
        good = values.isfinite() & (values >= 0)
        _refuse(info, values, good, "is no absolute maximum")
        return values.amax(0)

    def _read(self, info: TensorInfo) -> Tensor:
        values = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        return read_slice(self._reader, info, 0, info.shape, values)


def _refuse(info: TensorInfo, values: Tensor, good: Tensor, why: str) -> None:
    index = first_index(~good)
    if index is not None:
        raise InvalidInput(
            Problem(
                "bad-statistics",
                f"{float(values[index])} at index {list(index)} {why}",
                hint="Measure again, or take the smoothing out of the scheme.",
                file=str(info.file),
                tensor=info.name,
            )
        )
