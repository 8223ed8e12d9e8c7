"""Merging what the processes of ``torch.distributed`` measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from quantrecipe.converter.calibration.measurements import (
    Measurements,
    Summary,
    check_alike,
    joined_folds,
    summary_of,
)
from quantrecipe.converter.calibration.reservoir import Reservoir
from quantrecipe.converter.calibration.siblings import Siblings
from quantrecipe.converter.calibration.sums import ModuleSums, Sums
from quantrecipe.schema.statistics import ProvenFold


@dataclass(frozen=True, slots=True)
class _Told:
    """What one process tells the others beside its tensors."""

    summary: Summary
    samples: int
    prompts: int
    digest: int
    folds: tuple[ProvenFold, ...]
    passes: dict[str, list[int]]
    classes: dict[str, dict[str, int]]
    called: dict[str, set[str]]
    kept: dict[tuple[str, str], tuple[int, bool]]


def all_reduce(measurements: Measurements, group: dist.ProcessGroup | None) -> None:
    """As ``Measurements.all_reduce`` says."""
    told: list[_Told] = [_tell(measurements)] * dist.get_world_size(group)
    dist.all_gather_object(told, told[0], group)
    check_alike(*(each.summary for each in told))
    nccl = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    measurements._samples = sum(each.samples for each in told)
    measurements._prompts = sum(each.prompts for each in told)
    measurements._digest = sum(each.digest for each in told)
    measurements.folds = joined_folds(each.folds for each in told)
    for name, part in measurements.parts.items():
        part.passes = [sum(counts) for counts in zip(*(t.passes[name] for t in told), strict=True)]
        part.siblings = Siblings.of(part.modules)
        for each in told:
            part.siblings.refine(each.classes[name])
        for module, measured in part.modules.items():
            sums = measured.sums.sums.to(device)
            _reduce(sums, group)
            kept = measured.sums.kept
            if kept is not None:
                counts = [each.kept[name, module] for each in told]
                kept = _gather(kept.to(device), counts, group)
            called = any(module in each.called[name] for each in told)
            measured.sums = ModuleSums(sums, kept, called)


def _tell(measurements: Measurements) -> _Told:
    kept = {}
    for name, part in measurements.parts.items():
        for module, measured in part.modules.items():
            found = measured.sums.kept
            if found is not None:
                short = found.tokens.dtype == torch.bfloat16
                kept[name, module] = (len(found.keys), short)
    parts = measurements.parts
    return _Told(
        summary_of(measurements),
        measurements.samples,
        measurements._prompts,
        measurements._digest,
        measurements.folds,
        {name: part.passes for name, part in parts.items()},
        {name: part.siblings.classes for name, part in parts.items()},
        {name: part.called() for name, part in parts.items()},
        kept,
    )


def _reduce(sums: Sums, group: dist.ProcessGroup | None) -> None:
    for name, tensor in sums.tensors().items():
        whole = tensor.contiguous()
        dist.all_reduce(whole, dist.ReduceOp.MAX if name == "absmax" else dist.ReduceOp.SUM, group)
        setattr(sums, name, whole)


def _gather(
    kept: Reservoir, counts: list[tuple[int, bool]], group: dist.ProcessGroup | None
) -> Reservoir:
    """The tokens that are kept of all processes; how many each has, and whether in bfloat16."""
    most = max(count for count, _ in counts)
    exact = kept.tokens if all(short for _, short in counts) else kept.tokens.float()
    gathered = [_gathered(each, most, group) for each in (kept.keys, kept.bins, exact)]
    found = Reservoir.empty(kept.limit, exact.shape[1], kept.keys.device)
    for (count, _), keys, bins, tokens in zip(counts, *gathered, strict=True):
        theirs = Reservoir(kept.limit, keys[:count], bins[:count], tokens[:count])
        found = theirs.merged(found)
    return found


def _gathered(tensor: Tensor, most: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    """A tensor of every process, filled up to ``most`` rows."""
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    # As bytes, since not every backend knows every dtype.
    raw = padded.view(torch.uint8) if most else padded.to(torch.uint8)
    every = [torch.empty_like(raw) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, raw, group)
    return [each.view(tensor.dtype) if most else tensor[:0] for each in every]
