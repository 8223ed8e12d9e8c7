"""Giving a refused number its address: the file, the tensor, and the index in the whole of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from quantrecipe.formats import NonFinite, ScaleOutOfRange, Unrepresentable
from quantrecipe.formats.refusals import first_index
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.tensors import TensorInfo


@contextmanager
def naming(info: TensorInfo, first_row: int = 0, first_scale: int = 0) -> Iterator[None]:
    """Within it, a refused number of a block of ``info`` is named.

    Args:
        info: the tensor.
        first_row: the row of it that the block begins at.
        first_scale: the row of its grid of scales that the block's scales begin at.

    Raises:
        InvalidInput: in the place of ``Unrepresentable``, with tensor, index and file.
    """
    try:
        yield
    except Unrepresentable as refused:
        first = first_scale if isinstance(refused, ScaleOutOfRange) else first_row
        if refused.index and not isinstance(refused, ScaleOutOfRange):
            info, row = info.at_row(first + refused.index[0])
            first = row - refused.index[0]
        problem = replace(refused.at(info.name, first), file=str(info.file))
        raise InvalidInput(problem) from refused


def check_scales(grid: Tensor, info: TensorInfo, first_row: int = 0) -> None:
    """Refuse a source's scales that are no finite numbers, before they spoil codes that are fine.

    Args:
        grid: the scales, or the rows of them that begin at ``first_row``.
        info: the tensor that they were read from, whatever its shape.
        first_row: of the whole grid.

    Raises:
        InvalidInput: with the first of them, by its index in ``info``.
    """
    index = first_index(~torch.isfinite(grid))
    if index is None:
        return
    row, column = index
    flat = (first_row + row) * grid.shape[1] + column
    place: list[int] = []
    for dim in reversed(info.shape):
        place.insert(0, flat % dim)
        flat //= dim
    with naming(info):
        raise NonFinite(f"a scale of {float(grid[index])}", tuple(place))
