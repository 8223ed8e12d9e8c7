"""Looking at the values of scales, the only numbers small enough to be looked at in passing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantrecipe.checkpoint.reading import SourceReader
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.tensors import SourceFileInfo, TensorInfo

MOST_BYTES: Final = 256 << 20
"""The most bytes of scales that one look takes in."""

_LARGEST: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class _Float:
    """How a floating type lies in its bits, and the unsigned type of its size."""

    bits: type[np.unsignedinteger[Any]]
    mantissa: int
    exponent: int


_FLOATS: Final = {
    "float64": _Float(np.uint64, 52, 11),
    "float32": _Float(np.uint32, 23, 8),
    "float16": _Float(np.uint16, 10, 5),
    "bfloat16": _Float(np.uint16, 7, 8),
}


@dataclass(frozen=True, slots=True)
class ScaleCheck:
    """What a look at scales found.

    Attributes:
        problems: tensors with values that no scale can have.
        checked, skipped: how many tensors were looked at, and how many were left out for their
            size or dtype.
    """

    problems: tuple[Problem, ...]
    checked: int
    skipped: int


def check_scales(
    files: Iterable[SourceFileInfo],
    tensors: Sequence[TensorInfo],
    most_bytes: int = MOST_BYTES,
) -> ScaleCheck:
    """Look for NaN, infinite, zero, negative and subnormal values.

    Args:
        files: that the tensors lie in.
        tensors: scales or smoothing factors, in a plain dtype; others are skipped.
        most_bytes: after which no further tensor is read.

    Raises:
        InvalidInput, SourceError: as ``SourceReader.read_into``.
    """
    problems: list[Problem] = []
    checked = read = 0
    with SourceReader(files) as reader:
        for info in tensors:
            if info.dtype not in _FLOATS or info.nbytes > min(_LARGEST, most_bytes - read):
                continue
            read += info.nbytes
            checked += 1
            buffer = bytearray(info.nbytes)
            reader.read_into(info, 0, buffer)
            problems += _judge(info, np.frombuffer(buffer, _little(info.dtype)))
    return ScaleCheck(tuple(problems), checked, len(tensors) - checked)


def _little(dtype: str) -> np.dtype[Any]:
    return np.dtype(_FLOATS[dtype].bits).newbyteorder("<")


def _judge(info: TensorInfo, bits: NDArray[Any]) -> Iterator[Problem]:
    layout = _FLOATS[info.dtype]
    fraction = bits & ((1 << layout.mantissa) - 1)
    exponent = (bits >> layout.mantissa) & ((1 << layout.exponent) - 1)
    sign = bits >> (layout.mantissa + layout.exponent) != 0
    special = exponent == (1 << layout.exponent) - 1
    zero = (exponent == 0) & (fraction == 0)
    findings = (
        ("nan-scale", "NaN", special & (fraction != 0), _BROKEN),
        ("infinite-scale", "infinite", special & (fraction == 0), _BROKEN),
        ("zero-scale", "zero", zero, "Every number that it scales is lost."),
        ("negative-scale", "negative", sign & ~zero & ~special, _BROKEN),
        (
            "denormal-scale",
            "denormal",
            (exponent == 0) & (fraction != 0),
            f"It has lost digits, and devices may take it for zero: {info.dtype} is too narrow.",
        ),
    )
    for kind, what, mask, hint in findings:
        count = int(np.count_nonzero(mask))
        if count:
            first = list(np.unravel_index(int(np.argmax(mask)), info.shape)) if info.shape else []
            yield Problem(
                kind,
                f"{count:,} of {bits.size:,} values {'is' if count == 1 else 'are'} {what}, the "
                f"first at {[int(index) for index in first]}",
                hint=hint,
                file=str(info.file),
                tensor=info.name,
            )


_BROKEN: Final = "No scale can be that: the file is damaged, or was written by a broken tool."
