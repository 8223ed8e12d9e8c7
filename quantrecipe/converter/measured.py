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


def measured_as(module: PlannedModule, statistics: StatisticsFile) -> tuple[tuple[str, str], ...]:
    """The part and every name by which a statistics file has a module; one, where it has none.

    Where ``target.names`` rename, split or merge modules, they may be the source's names: the
    pieces of a module have the same input, so its maxima are the largest of all of them, and
    everything else is that of the first. Planning refuses second moments that differ.
    """
    names = [
        (module.part, name)
        for name in module.source.renamed_from
        if (module.part, name) in statistics
    ]
    if (module.part, module.name) in statistics or not names:
        return ((module.part, module.name),)
    return tuple(names)


def input_absmax(modules: Sequence[PlannedModule], statistics: StatisticsFile) -> Tensor:
    """The largest absolute input of each channel of siblings, over all bins, float32 ``[in]``.

    Raises:
        InvalidInput: a number cannot have been measured.
    """
    names = (name for one in modules for name in measured_as(one, statistics))
    found = (statistics.module(*name, tokens=False) for name in dict.fromkeys(names))
    return torch.stack([one.absmax() for one in found]).amax(0)


def kept_tokens(module: PlannedModule, statistics: StatisticsFile) -> TensorInfo | None:
    """The tensor of the tokens that were kept of a module, if there are any."""
    found = _tokens_kept(module, statistics)
    return None if found is None else found[1]


def _tokens_kept(
    module: PlannedModule, statistics: StatisticsFile
) -> tuple[tuple[str, str], TensorInfo] | None:
    for name in measured_as(module, statistics):
        info = statistics.tensors(*name).get("input_tokens")
        if info is not None and info.shape[0]:
            return name, info
    return None


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
        found = _tokens_kept(module, statistics)
        if found is not None:
            name, info = found
            tokens = statistics.module(*name).tokens_kept()
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
        total = file.module(*measured_as(module, file)[0], tokens=False).second_moment()
    assert total is not None
    if factors is not None:
        total /= factors.double().square()
    if module.rotation is not None:
        blocks = total.view(-1, module.rotation.size)
        total = blocks.mean(1, keepdim=True).expand_as(blocks).reshape(-1)
    return (total * math.ldexp(1.0, -math.frexp(float(total.amax()))[1])).float()
