"""Tensors of outputs (latents, logits, hidden states) held against the reference's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quantrecipe.checkpoint import SourceError, read_header
from quantrecipe.evaluate.metrics.protocol import TENSORS, Against, unusable
from quantrecipe.schema.tensors import TensorInfo

MOST_DECIBELS: Final = 200.0
"""The SQNR of outputs that are the same, and the largest one: infinity has no mean."""

_DTYPES: Final = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
_BLOCK_BYTES: Final = 1 << 22

Numbers = NDArray[np.float64]


class Sqnr:
    """Signal to noise over all tensors of a file: ``10 log10(sum r^2 / sum (x - r)^2)``."""

    name = "sqnr"
    higher_is_better = True
    suffixes = TENSORS
    against: Against = "reference"

    def score(self, output: Path, against: Path | str) -> float:
        signal = noise = 0.0
        for x, r in _blocks(output, Path(against)):
            signal += float(np.square(r).sum())
            noise += float(np.square(x - r).sum())
        if not noise:
            return MOST_DECIBELS
        if not signal:
            raise unusable(Path(against), "no-signal", "all numbers of the reference are 0")
        return min(MOST_DECIBELS, 10 * math.log10(signal / noise))


class Cosine:
    """The cosine between all numbers of a file and those of the reference's."""

    name = "cosine"
    higher_is_better = True
    suffixes = TENSORS
    against: Against = "reference"

    def score(self, output: Path, against: Path | str) -> float:
        shared = power = reference = 0.0
        for x, r in _blocks(output, Path(against)):
            shared += float((x * r).sum())
            power += float(np.square(x).sum())
            reference += float(np.square(r).sum())
        for path, found in ((output, power), (Path(against), reference)):
            if not found:
                raise unusable(path, "no-signal", "all numbers are 0, which have no direction")
        return max(-1.0, min(1.0, shared / math.sqrt(power) / math.sqrt(reference)))


def _blocks(output: Path, reference: Path) -> Iterator[tuple[Numbers, Numbers]]:
    """The same numbers of both files, some at a time.

    Raises:
        InvalidInput: they have not the same tensors, or numbers that are not finite.
        SourceError: a file cannot be read.
    """
    found, wanted = read_header(output).tensors, read_header(reference).tensors
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found or name not in wanted:
            path, other = (output, reference) if name in found else (reference, output)
            raise unusable(path, "missing-tensor", f"it has {name!r}, and {other} has not")
        x, r = found[name], wanted[name]
        if x.shape != r.shape:
            message = f"{name!r} is {list(x.shape)}, and {list(r.shape)} in the reference"
            raise unusable(output, "misshaped-tensor", message)
        yield from zip(_numbers(output, x), _numbers(reference, r), strict=True)


def _numbers(path: Path, info: TensorInfo) -> Iterator[Numbers]:
    """The numbers of a tensor of a file; as many at a time whatever its dtype."""
    code = _DTYPES.get(info.dtype)
    if code is None:
        message = f"{info.name!r} has dtype {info.dtype}"
        raise unusable(path, "wrong-dtype", message, f"Expected {', '.join(_DTYPES)}.")
    left, size = math.prod(info.shape), np.dtype(code).itemsize
    try:
        with path.open("rb") as file:
            file.seek(info.offset)
            while left:
                count = min(left, _BLOCK_BYTES // 8)
                raw = np.frombuffer(file.read(count * size), code)
                if info.dtype == "bfloat16":
                    raw = (raw.astype("<u4") << 16).view("<f4")
                numbers = raw.astype(np.float64)
                if len(numbers) != count or not np.isfinite(numbers).all():
                    raise unusable(path, "not-finite", f"{info.name!r} has what is no number")
                yield numbers
                left -= count
    except OSError as error:
        raise SourceError(path, error, info.name) from error
