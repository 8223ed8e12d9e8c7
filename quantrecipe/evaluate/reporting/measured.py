"""The largest inputs of modules, from a statistics file, read row by row and without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from quantrecipe.checkpoint import SourceReader, file_sha256, read_header
from quantrecipe.evaluate.reporting.fields import Source
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.statistics import STATISTICS_KEY, Statistics
from quantrecipe.schema.tensors import TensorInfo
from quantrecipe.schema.validation import load_statistics_header

_ROW = npt.NDArray[np.float32]
_MOST_CHANNELS: Final = 1 << 22
_TENSOR: Final = "input_absmax"


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a module.

    Attributes:
        part, name: which.
        largest: in each timestep bin, the largest absolute input of any channel.
        median: in each timestep bin, that of the median channel.
        max_to_median: the largest channel to the median channel, over all bins; infinite if more
            than half of them have no input, and 1 if none has.
    """

    part: str
    name: str
    largest: tuple[float, ...]
    median: tuple[float, ...]
    max_to_median: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A statistics file.

    Attributes:
        source: the file.
        header: what was measured, and on what.
        modules: the spikiest first.
    """

    source: Source
    header: Statistics
    modules: tuple[Inputs, ...]


def read_measured(path: Path) -> Measured:
    """Read the input maxima of every module of a statistics file.

    Raises:
        InvalidInput: it is none, or holds what cannot have been measured.
        SourceError: the system could not read it.
    """
    file = read_header(path)
    text = file.metadata.get(STATISTICS_KEY)
    if text is None:
        raise InvalidInput(
            Problem(
                "not-statistics",
                f"its metadata has no {STATISTICS_KEY!r}: it is not a statistics file",
                hint="Name the file of what calibration measured.",
                file=str(path),
            )
        )
    header = load_statistics_header(text, str(path))
    with SourceReader([file]) as reader:
        found = [
            _inputs(part, name, file.tensors.get(f"{part}/{name}/{_TENSOR}"), header, reader, path)
            for part, names in header.modules.items()
            for name in names
        ]
    found.sort(key=lambda module: (-module.max_to_median, module.part, module.name))
    return Measured(Source(path.name, file_sha256(path)), header, tuple(found))


def _inputs(
    part: str,
    name: str,
    info: TensorInfo | None,
    header: Statistics,
    reader: SourceReader,
    path: Path,
) -> Inputs:
    bins = len(header.timesteps)
    shape = None if info is None else info.shape
    if (
        info is None
        or info.dtype != "float32"
        or len(info.shape) != 2
        or info.shape[0] != bins
        or not 0 < info.shape[1] <= _MOST_CHANNELS
    ):
        message = f"{_TENSOR!r} of {part}/{name} has to be float32 [{bins}, channels]"
        raise _refused(path, message if shape is None else f"{message}, and is {list(shape)}")
    whole = np.zeros(info.shape[1], np.float32)
    largest, median = [], []
    for row in _rows(info, reader):
        if not bool((np.isfinite(row) & (row >= 0)).all()):
            raise _refused(path, f"{_TENSOR!r} of {part}/{name} holds what no maximum can be")
        np.maximum(whole, row, out=whole)
        largest.append(float(row.max()))
        median.append(float(np.median(row)))
    return Inputs(part, name, tuple(largest), tuple(median), _max_to_median(whole))


def _max_to_median(absmax: _ROW) -> float:
    """As statistics have it: 1 where all channels are 0."""
    largest, median = float(absmax.max()), float(np.quantile(absmax.astype(np.float64), 0.5))
    if largest == 0:
        return 1.0
    return largest / median if median > 0 else math.inf


def _rows(info: TensorInfo, reader: SourceReader) -> Iterator[_ROW]:
    row = np.empty(info.shape[1], "<f4")
    for index in range(info.shape[0]):
        reader.read_into(info, index * row.nbytes, row)
        yield row


def _refused(path: Path, message: str) -> InvalidInput:
    return InvalidInput(Problem("bad-statistics", message, hint="Measure again.", file=str(path)))
