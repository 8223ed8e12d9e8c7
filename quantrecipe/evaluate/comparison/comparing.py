"""One module or tensor against that of another checkpoint: bytes, codes, numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from quantrecipe.evaluate.comparison.measuring import Gap, Rounded
from quantrecipe.evaluate.comparison.reading import (
    BESIDE_WEIGHT,
    ModuleRows,
    StoredTensor,
    as_float,
)
from quantrecipe.evaluate.comparison.records import VERDICTS, Distance, Rounding, Verdict
from quantrecipe.evaluate.unequal import place_of
from quantrecipe.schema.schemes import ScaledWeight

_NUMBERS: Final = 1 << 18
"""Of a tensor without rows, as many at a time whatever the memory: sums depend on the cut."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What comparing found; the fields are those of ``Compared``."""

    verdict: Verdict
    details: tuple[str, ...] = ()
    rounding: Rounding | None = None
    distance: Distance | None = None


SAME: Final = Outcome("same")


def compare_modules(a: ModuleRows, b: ModuleRows, block_bytes: int) -> Outcome:
    """What became of a module: of its weight, and of what it has beside that.

    Where its numbers are the same, the verdict is ``same``; ``storage`` tells ``moved`` from it.

    Raises:
        InvalidInput, SourceError: a file cannot be read, or was changed meanwhile.
    """
    if a.shape != b.shape:
        return Outcome("changed", (f"shape {list(a.shape)} -> {list(b.shape)}",))
    found = [_compare_weights(a, b, block_bytes)]
    for role in BESIDE_WEIGHT:
        mine, theirs = a.tensor(role), b.tensor(role)
        words = role.replace("_", " ")
        if mine is None or theirs is None:
            if mine is not theirs:
                where = "A" if theirs is None else "B"
                found.append(Outcome("changed", (f"{words} only in {where}",)))
            continue
        beside = compare_tensors(mine, theirs, block_bytes)
        if beside.verdict != "same":
            found.append(_beside(words, mine, theirs, beside))
    return _together(found)


def compare_tensors(a: StoredTensor, b: StoredTensor, block_bytes: int) -> Outcome:
    """What became of a tensor by itself: of its numbers, in their order.

    Raises:
        InvalidInput, SourceError: as ``compare_modules``.
    """
    if a.info.shape != b.info.shape:
        return Outcome("changed", (f"shape {list(a.info.shape)} -> {list(b.info.shape)}",))
    if a.plain and b.plain:
        if a.has_bytes_of(b, block_bytes):
            return SAME
        return _compare_plain(a, b)
    if a.info.dtype != b.info.dtype:
        return Outcome("changed")
    unequal = a.unequal_byte(b, block_bytes)
    if unequal is None:
        return SAME
    return Outcome("changed", (f"differs first at {list(place_of(a.info, unequal))}",))


def _compare_weights(a: ModuleRows, b: ModuleRows, block_bytes: int) -> Outcome:
    if a.coded_as(b) and _same_bytes(a, b, block_bytes):
        return SAME
    if a.is_itself and b.is_itself:
        mine, theirs = a.tensor("weight"), b.tensor("weight")
        assert mine is not None
        assert theirs is not None
        return _compare_plain(mine, theirs)
    if _same_codes(a, b, block_bytes):
        return SAME
    scaled = isinstance(a.weight, ScaledWeight) or isinstance(b.weight, ScaledWeight)
    return Outcome("requantized" if scaled else "changed", distance=_measure(a, b, block_bytes))


def _same_bytes(a: ModuleRows, b: ModuleRows, block_bytes: int) -> bool:
    ours, theirs = a.of_weight(), b.of_weight()
    return ours.keys() == theirs.keys() and all(
        ours[role].has_bytes_of(theirs[role], block_bytes)
        # The small ones first.
        for role in sorted(ours, key=lambda role: ours[role].info.nbytes)
    )


def _same_codes(a: ModuleRows, b: ModuleRows, block_bytes: int) -> bool:
    """Whether all that is stored is the same, however it is packed and scales are shaped."""
    one, other = a.weight, b.weight
    if not isinstance(one, ScaledWeight) or not isinstance(other, ScaledWeight):
        return False
    alike = (one.format, one.has_zero_points) == (other.format, other.has_zero_points)
    if not alike or not a.turned_as(b):
        return False
    same_grid = one.group_shape(*a.shape) == other.group_shape(*b.shape)
    for start, stop in a.blocks(b, block_bytes):
        mine, theirs = a.stored(start, stop), b.stored(start, stop)
        if not torch.equal(mine.codes.view(torch.uint8), theirs.codes.view(torch.uint8)):
            return False
        for grid, another in zip(mine[1:], theirs[1:], strict=True):
            if grid is None or another is None:
                continue
            if not same_grid:
                grid = a.spread(grid, stop - start)
                another = b.spread(another, stop - start)
            if not torch.equal(grid.float(), another.float()):
                return False
    return True


def _measure(a: ModuleRows, b: ModuleRows, block_bytes: int) -> Distance:
    gap = Gap()
    for start, stop in a.blocks(b, block_bytes):
        gap.take_in(a.values(start, stop), b.values(start, stop), start)
    if gap.at is None:
        return Distance(gap.sqnr_db(), gap.worst)
    first, row, column = gap.at
    at = first + row, column
    step = b.step(*at) if isinstance(b.weight, ScaledWeight) else a.step(*at)
    in_scales = gap.worst / step if gap.worst is not None and step else None
    return Distance(gap.sqnr_db(), gap.worst, at, in_scales)


def _compare_plain(a: StoredTensor, b: StoredTensor) -> Outcome:
    """Plain numbers of one shape, of which some bytes or the dtypes differ."""
    gap, rounded = Gap(), Rounded()
    other_dtype = a.info.dtype != b.info.dtype
    count = int(np.prod(a.info.shape, dtype=np.int64))
    for start in range(0, count, _NUMBERS):
        mine, theirs = (each.numbers(start, min(start + _NUMBERS, count)) for each in (a, b))
        if other_dtype:
            rounded.take_in(mine, theirs)
        gap.take_in(as_float(mine), as_float(theirs), start)
    at = None
    if gap.at is not None:
        at = tuple(int(i) for i in np.unravel_index(gap.at[0] + gap.at[2], a.info.shape))
    distance = Distance(gap.sqnr_db(), gap.worst, at)
    how = rounded.found() if other_dtype else None
    if how is not None:
        return Outcome("dtype", (), how, None if how == "lossless" else distance)
    details = ("only signs of zeros or bits of NaNs",) if distance.exact else ()
    return Outcome("changed", details, distance=distance)


def _together(found: Sequence[Outcome]) -> Outcome:
    """The gravest verdict; distance and rounding are those of the weight, the first."""
    weight = found[0]
    gravest = max(found, key=lambda each: VERDICTS.index(each.verdict))
    details = tuple(detail for each in found for detail in each.details)
    return Outcome(gravest.verdict, details, weight.rounding or gravest.rounding, weight.distance)


def _beside(words: str, a: StoredTensor, b: StoredTensor, outcome: Outcome) -> Outcome:
    """What became of a tensor beside a weight, in words."""
    said = [*outcome.details]
    if a.info.dtype != b.info.dtype:
        said.append(f"{a.info.dtype} -> {b.info.dtype}")
    distance = outcome.distance
    if distance is not None and distance.at is not None:
        error = (
            "not finite" if distance.worst_error is None else f"off by {distance.worst_error:.4g}"
        )
        said.append(f"{error} at {list(distance.at)}")
    about = f": {', '.join(said)}" if said else " differs"
    return Outcome(outcome.verdict, (words + about,), outcome.rounding)
