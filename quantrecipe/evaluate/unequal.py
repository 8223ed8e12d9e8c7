"""Where the bytes of two tensors differ."""

from __future__ import annotations

import numpy as np

from quantrecipe.loaders import Checkpoint
from quantrecipe.schema.dtypes import DTYPES
from quantrecipe.schema.tensors import TensorInfo


def first_unequal_byte(
    one: Checkpoint, first: TensorInfo, other: Checkpoint, second: TensorInfo, block_bytes: int
) -> int | None:
    """The first byte in which two tensors of as many bytes differ; ``None`` if they do not.

    Args:
        one: the checkpoint of ``first``.
        first: a tensor.
        other: the checkpoint of ``second``.
        second: another one.
        block_bytes: how many bytes of each to hold at a time.
    """
    for start in range(0, first.nbytes, block_bytes):
        size = min(block_bytes, first.nbytes - start)
        blocks = bytearray(size), bytearray(size)
        one.read_into(first, start, blocks[0])
        other.read_into(second, start, blocks[1])
        if blocks[0] != blocks[1]:
            unequal = np.frombuffer(blocks[0], np.uint8) != np.frombuffer(blocks[1], np.uint8)
            return start + int(unequal.argmax())
    return None


def place_of(info: TensorInfo, byte: int) -> tuple[int, ...]:
    """The index of the number that a byte of a tensor belongs to."""
    element = byte * 8 // DTYPES[info.dtype].bits
    return tuple(int(index) for index in np.unravel_index(element, info.shape))
