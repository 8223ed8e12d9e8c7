"""Looking at the values of scales, the only numbers small enough to be looked at in passing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantrecipe.checkpoint.reading import SourceReader
from quantrecipe.schema.factors import DENORMAL, INFINITE, NAN, NEGATIVE, ZERO, Factor
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.schemes import GgmlRecords
from quantrecipe.schema.tensors import SourceFileInfo, TensorInfo

MOST_BYTES: Final = 256 << 20
"""The most bytes of scales that one look takes in."""

_LARGEST: Final = 64 << 20
_MOST_ROWS: Final = 256
_RUN: Final = 64 << 10
"""Bytes of records that are looked at in each of three places of a weight."""


@dataclass(frozen=True, slots=True)
class _Float:
    """How a floating type lies in its bits, and the unsigned type of its size.

    Attributes:
        bits: the unsigned type.
        mantissa, exponent: how many bits of each.
        special: ``ieee``: an exponent of ones is an infinity or NaN; ``ones``: all ones is NaN, and
            there is no infinity; ``exponent``: so, without a sign, a mantissa or a zero.
    """

    bits: type[np.unsignedinteger[Any]]
    mantissa: int
    exponent: int
    special: str = "ieee"


_FLOATS: Final = {
    "float64": _Float(np.uint64, 52, 11),
    "float32": _Float(np.uint32, 23, 8),
    "float16": _Float(np.uint16, 10, 5),
    "bfloat16": _Float(np.uint16, 7, 8),
    "float8_e4m3fn": _Float(np.uint8, 3, 4, "ones"),
    "float8_e5m2": _Float(np.uint8, 2, 5),
    "float8_e8m0fnu": _Float(np.uint8, 0, 8, "exponent"),
}

_RECORD_SCALES: Final = {"q8_0": (0,), "q4_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}
"""Where in a record of ggml the float16 scales are, in bytes (ggml-common.h)."""


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
    factors: Sequence[Factor],
    most_bytes: int = MOST_BYTES,
) -> ScaleCheck:
    """Look for NaN, infinite, zero, negative and subnormal values.

    A scale of zero is fine where all that it scales is zero: programs write it for rows of zeros.

    Args:
        files: that the tensors lie in.
        factors: scales or smoothing factors, in a floating dtype; others are skipped.
        most_bytes: after which no further tensor is read.

    Raises:
        InvalidInput, SourceError: as ``SourceReader.read_into``.
    """
    problems: list[Problem] = []
    checked = read = 0
    with SourceReader(files) as reader:
        for factor in factors:
            info, dtype = factor.info, factor.dtype or factor.info.dtype
            if dtype not in _FLOATS or info.nbytes > min(_LARGEST, most_bytes - read):
                continue
            read += info.nbytes
            checked += 1
            bits = _numbers(reader, info, dtype)
            for kind, what, mask, hint in _findings(bits, dtype):
                harmless = kind in factor.fine or (
                    kind == ZERO and mask.any() and _over_zeros(reader, factor, mask)
                )
                if not harmless:
                    problems += _told(info, kind, what, mask.reshape(info.shape), hint)
    return ScaleCheck(tuple(problems), checked, len(factors) - checked)


def check_records(
    files: Iterable[SourceFileInfo], weights: Iterable[tuple[TensorInfo, GgmlRecords]]
) -> Iterator[Problem]:
    """Look for NaN and infinite scales in records of ggml: in the first, middle and last of each.

    Zero and negative ones are as they should be: ggml writes them.

    Args:
        files: that the weights lie in.
        weights: the weights, and how they are stored.

    Raises:
        InvalidInput, SourceError: as ``SourceReader.read_into``.
    """
    with SourceReader(files) as reader:
        for info, weight in weights:
            size = weight.record[1]
            count = info.nbytes // size
            run = min(count, max(1, _RUN // size))
            for first in sorted({0, (count - run) // 2, count - run}):
                buffer = bytearray(run * size)
                reader.read_into(info, first * size, buffer)
                records = np.frombuffer(buffer, np.uint8).reshape(run, size)
                found = list(_judge_records(info, records, weight, first))
                yield from found
                if found:
                    break


def _judge_records(
    info: TensorInfo, records: NDArray[Any], weight: GgmlRecords, first: int
) -> Iterator[Problem]:
    columns = info.shape[-1] // weight.record[0]
    for place in _RECORD_SCALES[weight.format]:
        bits = np.ascontiguousarray(records[:, place : place + 2]).view("<u2")[:, 0]
        for kind, what, mask, hint in _findings(bits, "float16"):
            if kind in (NAN, INFINITE) and mask.any():
                record = first + int(np.argmax(mask))
                yield Problem(
                    kind,
                    f"the scale of a record is {what}, that of row {record // columns}, columns "
                    f"from {record % columns * weight.record[0]} on",
                    hint=hint,
                    file=str(info.file),
                    tensor=info.name,
                )


def _numbers(reader: SourceReader, info: TensorInfo, dtype: str) -> NDArray[Any]:
    buffer = bytearray(info.nbytes)
    reader.read_into(info, 0, buffer)
    return np.frombuffer(buffer, np.dtype(_FLOATS[dtype].bits).newbyteorder("<"))


_Finding = tuple[str, str, NDArray[Any], str]


def _findings(bits: NDArray[Any], dtype: str) -> Iterator[_Finding]:
    layout = _FLOATS[dtype]
    ones = (1 << layout.exponent) - 1
    if layout.special == "exponent":
        yield NAN, "NaN", bits == ones, _BROKEN
        yield ZERO, "the exponent 0", bits == 0, "Some programs take it for 0, others for 2^-127."
        return
    fraction = bits & ((1 << layout.mantissa) - 1)
    exponent = (bits >> layout.mantissa) & ones
    sign = bits >> (layout.mantissa + layout.exponent) != 0
    special = exponent == ones
    if layout.special == "ones":
        special &= fraction == (1 << layout.mantissa) - 1
        nan, infinite = special, np.zeros_like(special)
    else:
        nan, infinite = special & (fraction != 0), special & (fraction == 0)
    zero = (exponent == 0) & (fraction == 0)
    yield NAN, "NaN", nan, _BROKEN
    yield INFINITE, "infinite", infinite, _BROKEN
    yield ZERO, "zero", zero, "Every number that it scales is lost."
    yield NEGATIVE, "negative", sign & ~zero & ~special, _BROKEN
    yield (
        DENORMAL,
        "denormal",
        (exponent == 0) & (fraction != 0),
        f"It has lost digits, and devices may take it for zero: {dtype} is too narrow.",
    )


def _told(
    info: TensorInfo, kind: str, what: str, mask: NDArray[Any], hint: str
) -> Iterator[Problem]:
    count = int(np.count_nonzero(mask))
    if not count:
        return
    first = list(np.unravel_index(int(np.argmax(mask)), info.shape)) if info.shape else []
    yield Problem(
        kind,
        f"{count:,} of {mask.size:,} values {'is' if count == 1 else 'are'} {what}, the "
        f"first at {[int(index) for index in first]}",
        hint=hint,
        file=str(info.file),
        tensor=info.name,
    )


def _over_zeros(reader: SourceReader, factor: Factor, mask: NDArray[Any]) -> bool:
    """Whether all codes under scales of zero are zero, as far as a bounded look tells."""
    codes, weight = factor.codes, factor.weight
    if codes is None or weight is None:
        return False
    rows, columns = factor.shape
    if not rows * columns:
        return True
    tall, wide = weight.group_shape(rows, columns)
    across = -(-columns // wide)
    # A sign alone is a zero too.
    digits = 0xFF if codes.dtype == "int8" else 0x7F
    left = _MOST_ROWS
    for place in np.flatnonzero(mask).tolist():
        row, column = place // across * tall, place % across * wide
        for each in range(row, min(row + tall, rows)):
            if not left:
                return True
            left -= 1
            buffer = bytearray(min(wide, columns - column))
            reader.read_into(codes, each * columns + column, buffer)
            if (np.frombuffer(buffer, np.uint8) & digits).any():
                return False
    return True


_BROKEN: Final = "No scale can be that: the file is damaged, or was written by a broken tool."
