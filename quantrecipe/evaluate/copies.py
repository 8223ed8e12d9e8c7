"""What was not quantized, against its source: the same bytes, or the exact cast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantrecipe.evaluate.proofs import row_blocks
from quantrecipe.evaluate.unequal import first_unequal_byte, place_of
from quantrecipe.formats import Unrepresentable, cast, plain_dtype
from quantrecipe.formats.folding import FoldedFactors, fold_rows, fold_vector
from quantrecipe.loaders import Checkpoint
from quantrecipe.schema.dtypes import is_plain
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.schemes import PlainWeight, ScaledWeight
from quantrecipe.schema.tensors import TensorInfo

_HINT = "It was edited, or is of another source; convert again."


def check_copy(
    source: Checkpoint,
    original: TensorInfo,
    output: Checkpoint,
    copied: TensorInfo,
    block_bytes: int,
) -> Iterator[Problem]:
    """Hold a tensor that was carried over to the one it was carried over from, byte by byte.

    The shape may differ where the numbers are scales, which layouts shape differently.
    """
    if (original.dtype, original.nbytes) != (copied.dtype, copied.nbytes):
        yield _mistyped(original, copied)
        return
    unequal = first_unequal_byte(source, original, output, copied, block_bytes)
    if unequal is not None:
        message = f"differs from the source, first at {list(place_of(copied, unequal))}"
        yield _differs("not-a-copy", message, copied)


def check_vector(
    source: Checkpoint,
    original: TensorInfo,
    output: Checkpoint,
    copied: TensorInfo,
    divisors: Tensor | None,
) -> Iterator[Problem]:
    """Hold a vector to the source's, divided by what is folded into it, in its dtype.

    Raises:
        InvalidInput: a number of the source cannot be divided.
    """
    if original.shape != copied.shape or not is_plain(copied.dtype):
        yield _mistyped(original, copied)
        return
    with _naming(original):
        wanted = fold_vector(source.tensor(original), divisors, plain_dtype(copied.dtype))
    unequal = _bits(wanted) != _bits(output.tensor(copied))
    if unequal.any():
        message = f"is not the source's{_with(divisors)}, first at {unequal.argmax()}"
        yield _differs("not-divided", message, copied)


def check_cast(
    source: Checkpoint,
    output: Checkpoint,
    name: str,
    part: str,
    block_bytes: int,
    folds: FoldedFactors,
) -> Iterator[Problem]:
    """Hold a plain weight to the source's: the same bytes in the same dtype, else the exact cast.

    Where smoothing is folded, it is the cast of what the factors make of it.

    Raises:
        InvalidInput: a number of the source cannot be cast.
    """
    before, after = source.module(name, part), output.module(name, part)
    assert isinstance(after.weight, PlainWeight)
    info = after.tensors["weight"]
    factors = folds.factors(part, name)
    divisors = folds.divisors(part, name, after.out_features)
    rows_in, rows_out = source.stored(name, part), output.stored(name, part)
    direct = isinstance(before.weight, PlainWeight)
    for start, stop in row_blocks(before, after, block_bytes):
        with _naming(before.tensors["weight"], start):
            rows = rows_in.codes(start, stop) if direct else rows_in.decoded(start, stop)
            if factors is not None or divisors is not None:
                own = None if divisors is None else divisors[start:stop]
                rows = fold_rows(rows, factors, own)
            wanted = cast(rows, after.weight.format)
        unequal = _bits(wanted) != _bits(rows_out.codes(start, stop))
        if unequal.any():
            row, column = (int(index) for index in np.argwhere(unequal)[0])
            message = (
                f"is not the source's weight in {after.weight.format}, first at row "
                f"{start + row}, column {column}"
            )
            yield _differs("not-the-cast", message, info)
            return


def check_carried(
    source: Checkpoint, output: Checkpoint, name: str, part: str, block_bytes: int
) -> Iterator[Problem]:
    """Hold codes and scales that went over as they are to the source's, wherever they lie now."""
    before, after = source.module(name, part), output.module(name, part)
    rows_in, rows_out = source.stored(name, part), output.stored(name, part)
    weight = after.weight
    assert isinstance(weight, ScaledWeight)

    def differ(role: str, one: Tensor | None, other: Tensor | None, start: int = 0) -> bool:
        if one is None or other is None:
            return one is not other
        wide = one.to(other.dtype) if one.dtype.is_floating_point else one
        return wide.shape != other.shape or bool((_bits(wide) != _bits(other)).any())

    for start, stop in row_blocks(before, after, block_bytes):
        pairs = {
            "weight": (rows_in.codes(start, stop), rows_out.codes(start, stop)),
            "weight_zero_point": (rows_in.zeros(start, stop), rows_out.zeros(start, stop)),
        }
        if not weight.has_two_levels:
            pairs["weight_scale"] = rows_in.scales(start, stop), rows_out.scales(start, stop)
        for role, (one, other) in pairs.items():
            if differ(role, one, other):
                message = f"its {role.replace('_', ' ')} is not the source's, from row {start} on"
                yield _differs("not-a-copy", message, after.tensors[role])
                return
    whole: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "smoothing": (rows_in.factors(), rows_out.factors())
    }
    if weight.has_two_levels:
        one_levels, other_levels = rows_in.two_levels(), rows_out.two_levels()
        inverted = before.stored("second_scale") != after.stored("second_scale")
        second = one_levels.second, other_levels.second
        if inverted and after.stored("second_scale").reciprocal:
            # Divided into 1 when it was written and again when it is read; float32 rounds both.
            second = second[0].reciprocal().reciprocal(), second[1]
        whole |= {
            "weight_scale": (one_levels.scale, other_levels.scale),
            "second_scale": second,
            "scale_offset": (one_levels.offset, other_levels.offset),
        }
    for role, (one, other) in whole.items():
        if differ(role, one, other):
            message = f"its {role.replace('_', ' ')} is not the source's"
            yield _differs("not-a-copy", message, after.tensors.get(role, after.tensors["weight"]))
            return


@contextmanager
def _naming(info: TensorInfo, start: int = 0) -> Iterator[None]:
    """Within it, a refused number of a block of ``info`` that begins at ``start`` is named."""
    try:
        yield
    except Unrepresentable as refused:
        problem = replace(refused.at(info.name, start), file=str(info.file))
        raise InvalidInput(problem) from None


def _with(divisors: Tensor | None) -> str:
    return "" if divisors is None else ", divided by what is folded into it"


def _bits(block: Tensor) -> npt.NDArray[np.generic]:
    """The block's numbers as bit patterns: NaNs are equal to themselves, and 0 is not -0."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[block.dtype.itemsize]
    found: npt.NDArray[np.generic] = block.view(integer).numpy()
    return found


def _mistyped(original: TensorInfo, copied: TensorInfo) -> Problem:
    message = (
        f"is {copied.dtype} {list(copied.shape)}, and {original.dtype} "
        f"{list(original.shape)} in the source"
    )
    return _differs("mistyped-tensor", message, copied)


def _differs(kind: str, message: str, info: TensorInfo) -> Problem:
    return Problem(kind, message, _HINT, file=str(info.file), tensor=info.name)
