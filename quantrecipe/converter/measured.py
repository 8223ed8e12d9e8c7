"""What statistics files say of the inputs of the modules of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quantrecipe.converter.calibration import StatisticsFile, open_statistics
from quantrecipe.schema.plan import PlannedModule
from quantrecipe.schema.schemes import second_moments
from quantrecipe.schema.tensors import TensorInfo


def measured_as(module: PlannedModule, statistics: StatisticsFile) -> tuple[str, str]:
    """The part and name by which a statistics file may have a module.

    Where a target layout renames or splits a module, that may be the source's name: its pieces have
    the same input.
    """
    original = module.source.renamed_from
    if original is None or (module.part, module.name) in statistics:
        return module.part, module.name
    return module.part, original


def input_absmax(modules: Sequence[PlannedModule], statistics: StatisticsFile) -> Tensor:
    """The largest absolute input of each channel of siblings, over all bins, float32 ``[in]``.

    Raises:
        InvalidInput: a number cannot have been measured.
    """
    found = (statistics.module(*measured_as(one, statistics), tokens=False) for one in modules)
    return torch.stack([one.absmax() for one in found]).amax(0)


def kept_tokens(module: PlannedModule, statistics: StatisticsFile) -> TensorInfo | None:
    """The tensor of the tokens that were kept of a module, if there are any."""
    info = statistics.tensors(*measured_as(module, statistics)).get("input_tokens")
    return info if info is not None and info.shape[0] else None


def input_tokens(
    modules: Sequence[PlannedModule], statistics: StatisticsFile
) -> tuple[Tensor, TensorInfo]:
    """The tokens that are kept of the first sibling that has any, and where they are from.

    Returns:
        float32 ``[tokens, in]``, and the tensor of the file.

    Raises:
        InvalidInput: a number cannot have been measured.
    """
    for module in modules:
        info = kept_tokens(module, statistics)
        if info is not None:
            tokens = statistics.module(*measured_as(module, statistics)).tokens_kept()
            assert tokens is not None
            return tokens, info
    raise AssertionError("planning asks for tokens")


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
        InvalidInput: a number cannot have been measured.
    """
    named = second_moments(module.weight)
    if named is None:
        return None
    with open_statistics(statistics[named]) as file:
        total = file.module(*measured_as(module, file), tokens=False).second_moment()
    assert total is not None
    if factors is not None:
        total /= factors.double().square()
    if module.rotation is not None:
        blocks = total.view(-1, module.rotation.size)
        total = blocks.mean(1, keepdim=True).expand_as(blocks).reshape(-1)
    return (total * math.ldexp(1.0, -math.frexp(float(total.amax()))[1])).float()
