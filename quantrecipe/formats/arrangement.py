"""Scales of blocks in the tiles that GPUs read: 128 rows by 4 columns, 512 numbers each.

Number ``[r, c]`` of a grid lies at ``((r // 128) tiles + c // 4) 512 + (r % 32) 16 +
(r % 128 // 32) 4 + c % 4``, with as many ``tiles`` side by side as 4 columns each take (the layout
of block scaling factors in the documentation of cuBLAS, section 3.1.4.3.2). What tiles have beyond
the grid is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantrecipe.schema.storage import TILE_COLUMNS, TILE_ROWS, padded


def swizzle(grid: Tensor) -> Tensor:
    """A grid in tiles.

    Args:
        grid: ``[rows, columns]`` of a dtype of one byte.

    Returns:
        The same dtype, of the shape of the tiles side by side; those of 128 rows lie together.
    """
    rows, columns = grid.shape
    shape = padded(rows, TILE_ROWS), padded(columns, TILE_COLUMNS)
    whole = torch.zeros(shape, dtype=torch.uint8, device=grid.device)
    whole[:rows, :columns] = grid.view(torch.uint8)
    tiles = whole.view(-1, 4, 32, shape[1] // TILE_COLUMNS, TILE_COLUMNS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(shape).view(grid.dtype)


def unswizzle(stored: Tensor, rows: int, columns: int) -> Tensor:
    """The grid ``[rows, columns]`` that lies in tiles.

    Args:
        stored: of a dtype of one byte, of the shape of the tiles side by side.
        rows: of the grid.
        columns: of the grid.

    Raises:
        ValueError: the tiles are of another grid.
    """
    shape = padded(rows, TILE_ROWS), padded(columns, TILE_COLUMNS)
    if tuple(stored.shape) != shape:
        raise ValueError(
            f"a grid {[rows, columns]} has tiles {list(shape)}, not {list(stored.shape)}"
        )
    tiles = stored.view(torch.uint8).view(-1, shape[1] // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    whole = tiles.permute(0, 3, 2, 1, 4).reshape(shape)
    return whole[:rows, :columns].contiguous().view(stored.dtype)
