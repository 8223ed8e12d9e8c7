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
from quantrecipe.formats import Unrepresentable, cast
from quantrecipe.formats.folding import FoldedFactors, fold_rows, fold_vector
from quantrecipe.loaders import Checkpoint
from quantrecipe.schema.dtypes import DTYPES
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.schemes import PlainWeight
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
    for start in range(0, copied.nbytes, block_bytes):
        size = min(block_bytes, copied.nbytes - start)
        blocks = bytearray(size), bytearray(size)
        source.read_into(original, start, blocks[0])
        output.read_into(copied, start, blocks[1])
        if blocks[0] != blocks[1]:
            unequal = np.frombuffer(blocks[0], np.uint8) != np.frombuffer(blocks[1], np.uint8)
            element = (start + int(unequal.argmax())) * 8 // DTYPES[copied.dtype].bits
            place = [int(index) for index in np.unravel_index(element, copied.shape or (1,))]
            message = f"differs from the source, first at {place[: len(copied.shape)]}"
            yield _differs("not-a-copy", message, copied)
            return


def check_divided(
    source: Checkpoint,
    original: TensorInfo,
    output: Checkpoint,
    copied: TensorInfo,
    divisors: Tensor,
) -> Iterator[Problem]:
    """Hold a vector that smoothing is folded into to the source's, divided.

    Raises:
        InvalidInput: a number of the source cannot be divided.
    """
    if (original.dtype, original.shape) != (copied.dtype, copied.shape):
        yield _mistyped(original, copied)
        return
    with _naming(original):
        wanted = fold_vector(source.tensor(original), divisors)
    unequal = _bits(wanted) != _bits(output.tensor(copied))
    if unequal.any():
        message = (
            f"is not the source's, divided by what is folded into it, first at {unequal.argmax()}"
        )
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
    for start, stop in row_blocks(before, after, block_bytes):
        direct = isinstance(before.weight, PlainWeight)
        read = source.codes if direct else source.rows
        with _naming(before.tensors["weight"], start):
            rows = read(name, part, start, stop)
            if factors is not None or divisors is not None:
                own = None if divisors is None else divisors[start:stop]
                rows = fold_rows(rows, factors, own)
            wanted = cast(rows, after.weight.format)
        unequal = _bits(wanted) != _bits(output.codes(name, part, start, stop))
        if unequal.any():
            row, column = (int(index) for index in np.argwhere(unequal)[0])
            message = (
                f"is not the source's weight in {after.weight.format}, first at row "
                f"{start + row}, column {column}"
            )
            yield _differs("not-the-cast", message, info)
            return


@contextmanager
def _naming(info: TensorInfo, start: int = 0) -> Iterator[None]:
    """Within it, a refused number of a block of ``info`` that begins at ``start`` is named."""
    try:
        yield
    except Unrepresentable as refused:
        problem = replace(refused.at(info.name, start), file=str(info.file))
        raise InvalidInput(problem) from None


def _bits(block: Tensor) -> npt.NDArray[np.generic]:
    """The block's numbers as bit patterns: NaNs are equal to themselves, and 0 is not -0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[block.dtype.itemsize]
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
