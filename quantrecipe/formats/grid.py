"""Scaling groups: a weight's row block and its grid of scales, brought to shapes that broadcast."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def tiles(
    blocks: tuple[Tensor, ...], grid: Tensor, group: tuple[int, int]
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Views in which every scaling group has its scale along broadcast dimensions.

    Whole groups come in one tile; groups cut short at the last row or column come in tiles of
    their own (at most four in all), so nothing is padded, expanded or copied.

    Args:
        blocks: tensors of one shape ``[rows, in]``.
        grid: ``[ceil(rows / group[0]), ceil(in / group[1])]``.
        group: rows and columns that share a scale.

    Yields:
        For each tile the views ``[n, height, m, width]`` of the blocks, and ``[n, 1, m, 1]`` of the
        grid.
    """
    rows, columns = blocks[0].shape
    for top, bottom, height in _runs(rows, group[0]):
        for left, right, width in _runs(columns, group[1]):
            shape = ((bottom - top) // height, height, (right - left) // width, width)
            views = tuple(block[top:bottom, left:right].view(shape) for block in blocks)
            scales = grid[
                top // group[0] : -(-bottom // group[0]), left // group[1] : -(-right // group[1])
            ]
            yield views, scales[:, None, :, None]


def _runs(length: int, size: int) -> Iterator[tuple[int, int, int]]:
    whole = length - length % size
    if whole:
        yield 0, whole, size
    if whole < length:
        yield whole, length, length - whole


def absmax(block: Tensor, group: tuple[int, int]) -> Tensor:
    """The absolute maximum of each scaling group; NaN and infinity come through.

    Returns:
        float32 ``[ceil(rows / group[0]), ceil(in / group[1])]``.
    """
    rows, columns = block.shape
    grid = block.new_empty((-(-rows // group[0]), -(-columns // group[1])))
    for (view,), target in tiles((block,), grid, group):
        # amax and amin run vectorized along a dimension on CPU; aminmax and abs do far worse.
        if view.shape[1] > 1:
            high, low = view.amax(1), view.amin(1)
        else:
            high = low = view.squeeze(1)
        target[:, 0, :, 0] = torch.maximum(high.amax(2), low.amin(2).neg_()).abs_()
    return grid


def extremes(block: Tensor, group: tuple[int, int]) -> Tensor:
    """The smallest and the largest number of each scaling group; NaN and infinity come through.

    Returns:
        float32 ``[2, ceil(rows / group[0]), ceil(in / group[1])]``.
    """
    rows, columns = block.shape
    found = block.new_empty((2, -(-rows // group[0]), -(-columns // group[1])))
    for (view,), target in tiles((block,), found[0], group):
        target[:, 0, :, 0] = view.amin(1).amin(2)
    for (view,), target in tiles((block,), found[1], group):
        target[:, 0, :, 0] = view.amax(1).amax(2)
    return found
