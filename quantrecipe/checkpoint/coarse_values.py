"""Weights whose numbers show that they were quantized more coarsely before.

Formats of 4 bits have 16 levels for each run of a row that shares a scale. Dequantized, and
quantized again by rows or not at all, a run still has at most 16 different numbers; 32 numbers that
were never quantized so are hardly ever less than 24. Runs of 32 columns are looked at, which is
what scales of 32, 64 and 128 columns have in common. A run says nothing that has fewer than four
different numbers, or codes that differ little: a row with one number far outside looks like that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from quantrecipe.checkpoint.reading import SourceReader
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.tensors import SourceFileInfo

_RUN: Final = 32
_LEVELS: Final = 16
_FEWEST: Final = 4
_SPAN: Final = 64
_RUNS: Final = 64
_SHARE: Final = 0.99
_BYTES: Final = 64 << 10
_MOST: Final = 24
_BITS: Final = {"float32": "<u4", "float16": "<u2", "bfloat16": "<u2", "int8": "i1"}


@dataclass(frozen=True, slots=True)
class Coarse:
    """What a look at some weights found: how many were looked at, and the coarse ones."""

    looked_at: int
    names: tuple[str, ...]


def coarse_weights(files: Iterable[SourceFileInfo], modules: Iterable[StoredModule]) -> Coarse:
    """Look at up to 64 KiB of each of at most 24 weights, plain ones and int8.

    Args:
        files: that the modules lie in.
        modules: as they are stored.

    Raises:
        InvalidInput, SourceError: as ``SourceReader.read_into``.
    """
    fit = [module for module in modules if _fits(module)]
    step = -(-len(fit) // _MOST) or 1
    chosen = fit[::step]
    with SourceReader(files) as reader:
        names = tuple(module.name for module in chosen if _is_coarse(reader, module))
    return Coarse(len(chosen), names)


def _fits(module: StoredModule) -> bool:
    info = module.tensors["weight"]
    return (
        info.dtype in _BITS
        and not module.storage
        and module.in_features % _RUN == 0
        and info.shape == (module.out_features, module.in_features)
        and module.out_features * module.in_features >= _RUN * _RUNS
    )


def _is_coarse(reader: SourceReader, module: StoredModule) -> bool:
    info = module.tensors["weight"]
    row = info.nbytes // module.out_features
    rows = min(module.out_features, max(1, _BYTES // row))
    buffer = bytearray(min(rows * row, max(_BYTES, _RUN * _RUNS * 4)))
    first = (module.out_features - rows) // 2
    reader.read_into(info, first * row, buffer)
    numbers = np.frombuffer(buffer, _BITS[info.dtype])
    runs = np.sort(numbers[: len(numbers) // _RUN * _RUN].reshape(-1, _RUN), axis=1)
    different = 1 + np.count_nonzero(np.diff(runs, axis=1), axis=1)
    telling = different >= _FEWEST
    if info.dtype == "int8":
        telling &= runs[:, -1].astype(np.int16) - runs[:, 0] >= _SPAN
    count = int(np.count_nonzero(telling))
    coarse = int(np.count_nonzero(telling & (different <= _LEVELS)))
    return count >= _RUNS and coarse >= _SHARE * count
