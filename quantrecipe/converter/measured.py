"""What statistics files say of the inputs of modules."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
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
from quantrecipe.schema.schemes import second_moments
from quantrecipe.schema.tensors import TensorInfo


def statistics_tensor(module: PlannedModule, measured: Container[str], what: str) -> str:
    """The name of something measured of a module in a statistics file.

    Where a target layout renames or splits a module, that may be of the source's module: its pieces
    have the same input.

    Args:
        module: the module.
        measured: the tensors that the file has.
        what: which, as ``quantrecipe.schema.statistics`` calls it.
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

    def second_moment(self, module: PlannedModule) -> Tensor:
        """A multiple of the mean of ``x^2`` of each channel, float64 ``[in]``.

        Over all tokens, or over the bins in a file that does not say how many tokens each has.

        Raises:
            InvalidInput: a mean is negative or no finite number: it was not measured.
        """
        info = self._info(module, "input_second_moment")
        moments = self._read(info)
        # The square of a float32 is at most 2^256.
        good = moments.isfinite() & (moments >= 0) & (moments <= 2.0**256)
        _refuse(info, moments, good, "is no mean of squares")
        tokens = [1.0] * len(moments)
        if statistics_tensor(module, self._header.tensors, "tokens") in self._header.tensors:
            counted = self._info(module, "tokens")
            counts = self._read(counted)
            _refuse(counted, counts, counts >= 0, "is no number of tokens")
            tokens = counts.double().tolist()
        total = torch.zeros(moments.shape[1], dtype=torch.float64)
        # One bin after the other: another machine's torch may add in another order.
        for moment, count in zip(moments, tokens, strict=True):
            total += moment * count
        return total

    def _absmax(self, module: PlannedModule) -> Tensor:
        info = self._info(module, "input_absmax")
        values = self._read(info)
        good = values.isfinite() & (values >= 0)
        _refuse(info, values, good, "is no absolute maximum")
        return values.amax(0)

    def _info(self, module: PlannedModule, what: str) -> TensorInfo:
        return self._header.tensors[statistics_tensor(module, self._header.tensors, what)]

    def _read(self, info: TensorInfo) -> Tensor:
        values = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        return read_slice(self._reader, info, 0, info.shape, values)


def column_importance(
    statistics: Mapping[str, Path], module: PlannedModule, factors: Tensor | None
) -> Tensor | None:
    """What squared errors of a weight's columns count for its quantizer.

    Column ``j`` counts by the mean of ``x_j^2``, divided by ``s_j^2`` where activations are divided
    by factors ``s_j``. A rotated column counts by the mean over its block, which is what rotated
    inputs have where those of the block are not correlated.

    Args:
        statistics: the statistics files, by the paths that schemes name them by.
        module: the module.
        factors: float32 ``[in]``, on the CPU.

    Returns:
        float32 ``[in]``, the largest below 1; ``None`` if all columns count the same.

    Raises:
        InvalidInput: a mean is negative or no finite number: it was not measured.
    """
    named = second_moments(module.weight)
    if named is None:
        return None
    with Measured(statistics[named]) as measured:
        total = measured.second_moment(module)
    if factors is not None:
        total /= factors.double().square()
    if module.rotation is not None:
        blocks = total.view(-1, module.rotation.size)
        total = blocks.mean(1, keepdim=True).expand_as(blocks).reshape(-1)
    return (total * math.ldexp(1.0, -math.frexp(float(total.amax()))[1])).float()


def _refuse(info: TensorInfo, values: Tensor, good: Tensor, why: str) -> None:
    index = first_index(~good)
    if index is not None:
        raise InvalidInput(
            Problem(
                "bad-statistics",
                f"{values[index].item()} at index {list(index)} {why}",
                hint="Measure again, or take what needs it out of the scheme.",
                file=str(info.file),
                tensor=info.name,
            )
        )
