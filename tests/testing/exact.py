"""The formats in exact rational arithmetic: what the expected numbers of the cases come from.

Numbers are Python floats (float64 holds every value of every dtype here, and the sign of a zero);
each operation is done on fractions and rounded once. Nothing of the package is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import product
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Binary:
    """A binary floating-point type.

    Attributes:
        bits: of a number.
        mantissa: stored bits of the mantissa.
        low: the exponent of the smallest normal number.
        largest: the largest finite number.
    """

    bits: int
    mantissa: int
    low: int
    largest: float

    def round(self, exact: Fraction, sign: float = 1.0) -> float:
        """To nearest, ties to even; ``sign`` is that of a result of zero."""
        step = Fraction(2) ** (max(exponent(exact), self.low) - self.mantissa)
        found = float(round(exact / step) * step)  # a fraction rounds half to even
        assert abs(found) <= self.largest, found
        return math.copysign(0.0, sign) if found == 0 else found

    def pattern(self, value: float) -> int:
        """The bits of a number that it holds exactly."""
        power = max(exponent(Fraction(value)), self.low)
        digits = abs(Fraction(value)) / Fraction(2) ** (power - self.mantissa)
        assert digits.denominator == 1, value
        # A normal number has a digit beyond the mantissa, which makes its exponent field 1 or more.
        magnitude = ((power - self.low) << self.mantissa) + int(digits)
        return magnitude | (math.copysign(1.0, value) < 0) << (self.bits - 1)


def exponent(exact: Fraction) -> int:
    """``floor(log2(abs(exact)))``; far below everything for zero."""
    if exact == 0:
        return -10_000
    guess = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    return guess if Fraction(2) ** guess <= abs(exact) else guess - 1


TYPES = {
    "float64": Binary(64, 52, -1022, float.fromhex("0x1.fffffffffffffp1023")),
    "float32": Binary(32, 23, -126, float.fromhex("0x1.fffffep127")),
    "float16": Binary(16, 10, -14, 65504.0),
    "bfloat16": Binary(16, 7, -126, float.fromhex("0x1.fep127")),
    "float8_e4m3fn": Binary(8, 3, -6, 448.0),
    "float8_e5m2": Binary(8, 2, -14, 57344.0),
}
LARGEST_CODE = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
FLOAT32 = TYPES["float32"]


def divide(a: float, b: float) -> float:
    """In float32."""
    return FLOAT32.round(Fraction(a) / Fraction(b), math.copysign(1.0, a) * math.copysign(1.0, b))


def multiply(a: float, b: float) -> float:
    """In float32."""
    return FLOAT32.round(Fraction(a) * Fraction(b), math.copysign(1.0, a) * math.copysign(1.0, b))


def convert(value: float, dtype: str) -> float:
    """A float64 value in another plain dtype."""
    return TYPES[dtype].round(Fraction(value), value)


@dataclass(frozen=True)
class Tensor:
    """Numbers, or for what is no finite number bytes.

    Attributes:
        dtype: as recipes name it.
        shape: sizes.
        flat: the numbers, last dimension fastest.
        raw: bytes, in place of numbers.
    """

    dtype: str
    shape: tuple[int, ...]
    flat: tuple[float, ...] = ()
    raw: bytes | None = None

    @property
    def rows(self) -> list[Sequence[float]]:
        """Of a matrix."""
        width = self.shape[1]
        return [self.flat[start : start + width] for start in range(0, len(self.flat), width)]

    def to_bytes(self) -> bytes:
        """Little-endian, as safetensors files hold it."""
        if self.raw is not None:
            return self.raw
        if self.dtype not in TYPES:
            size = 8 if self.dtype == "int64" else 1
            return b"".join(int(v).to_bytes(size, "little", signed=True) for v in self.flat)
        kind = TYPES[self.dtype]
        return b"".join(kind.pattern(v).to_bytes(kind.bits // 8, "little") for v in self.flat)

    def as_json(self, *, with_bytes: bool = False) -> Json:
        found: Json = {"dtype": self.dtype, "shape": list(self.shape)}
        if self.raw is None:
            whole = self.dtype not in TYPES
            found["values"] = _nested([int(v) if whole else v for v in self.flat], self.shape)
        if self.raw is not None or with_bytes:
            found["hex"] = self.to_bytes().hex()
        return found


def _nested(flat: list[Any], shape: tuple[int, ...]) -> Any:
    if not shape:
        return flat[0]
    if len(shape) == 1:
        return flat
    size = len(flat) // shape[0] if shape[0] else 0
    return [_nested(flat[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def tensor(dtype: str, values: Any, shape: tuple[int, ...] | None = None) -> Tensor:
    """Nested lists of numbers, each rounded to ``dtype``."""
    found: list[int] = []
    level = values
    while isinstance(level, (list, tuple)):
        found.append(len(level))
        level = level[0] if level else None
    flat = list(_flatten(values))
    kept = [convert(v, dtype) if dtype in TYPES else float(v) for v in flat]
    return Tensor(dtype, shape if shape is not None else tuple(found), tuple(kept))


def _flatten(values: Any) -> Iterable[float]:
    if isinstance(values, (list, tuple)):
        for value in values:
            yield from _flatten(value)
    else:
        yield float(values)


def cast(source: Tensor, dtype: str) -> Tensor:
    """In another plain dtype; float64 goes to 16 bits through float32."""
    through = "float32" if source.dtype == "float64" and dtype != "float64" else dtype
    flat = tuple(convert(convert(v, through), dtype) for v in source.flat)
    return Tensor(dtype, source.shape, flat)


@dataclass(frozen=True)
class Spec:
    """How a weight is stored: a format, the rows and columns that share a scale, their dtype."""

    format: str
    group: tuple[int, int] | None = None
    granularity: str = "channel"
    scale_dtype: str = "float32"

    def group_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = shape
        if self.group is not None:
            return self.group
        return (rows, columns) if self.granularity == "tensor" else (1, columns)

    def as_json(self) -> Json:
        found: Json = {"format": self.format, "granularity": self.granularity}
        if self.granularity == "group":
            assert self.group is not None
            found["group_size"] = self.group[1]
        if self.granularity == "block":
            assert self.group is not None
            found["block_size"] = list(self.group)
        return {**found, "scale_dtype": self.scale_dtype}

    def grid_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        height, width = self.group_of(shape)
        return -(-shape[0] // height), -(-shape[1] // width)


def quantize(weight: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Codes, and the grid of scales."""
    values = cast(weight, "float32")
    (height, width), grid = spec.group_of(weight.shape), spec.grid_shape(weight.shape)
    maxima = dict.fromkeys(product(range(grid[0]), range(grid[1])), 0.0)
    for i, j in product(*map(range, weight.shape)):
        place = i // height, j // width
        maxima[place] = max(maxima[place], abs(values.rows[i][j]))
    scales = {place: _scale(amax, spec) for place, amax in maxima.items()}
    codes = [
        [_code(values.rows[i][j], scales[i // height, j // width], spec.format) for j in columns]
        for i, columns in ((i, range(weight.shape[1])) for i in range(weight.shape[0]))
    ]
    return (
        tensor(spec.format, codes),
        Tensor(spec.scale_dtype, grid, tuple(scales.values())),
    )


def _scale(amax: float, spec: Spec) -> float:
    if amax == 0:
        return 1.0
    smallest = 2.0 ** TYPES[spec.scale_dtype].low
    return convert(max(divide(amax, LARGEST_CODE[spec.format]), smallest), spec.scale_dtype)


def _code(weight: float, scale: float, fmt: str) -> float:
    largest, ratio = LARGEST_CODE[fmt], divide(weight, scale)
    if fmt == "int8":
        return max(-largest, min(largest, float(round(ratio))))
    return convert(max(-largest, min(largest, ratio)), fmt)


def dequantize(codes: Tensor, scale: Tensor, spec: Spec) -> Tensor:
    """``float32(code) * float32(scale)``, rounded to float32."""
    (height, width), (_, across) = spec.group_of(codes.shape), spec.grid_shape(codes.shape)
    flat = [
        multiply(codes.rows[i][j], scale.flat[i // height * across + j // width])
        for i, j in product(*map(range, codes.shape))
    ]
    return Tensor("float32", codes.shape, tuple(flat))


def smoothing_factors(
    inputs: Sequence[float], weight: Tensor, alpha: float, *, power_of_two: bool = False
) -> Tensor:
    """``inputs^alpha / max|W|^(1 - alpha)`` by column; 1 where either is zero.

    ``power_of_two`` rounds to the nearest one, by ratio.
    """
    found = []
    for column, measured in enumerate(inputs):
        largest = max(abs(row[column]) for row in weight.rows)
        if measured == 0 or largest == 0:
            found.append(1.0)
            continue
        with localcontext() as context:
            context.prec = 60
            power = Decimal(measured) ** Decimal(alpha)
            power /= Decimal(largest) ** (1 - Decimal(alpha))
        factor = FLOAT32.round(Fraction(power))
        if power_of_two:
            exponent = math.frexp(factor)[1] - 1
            up = Fraction(factor) ** 2 >= Fraction(2) ** (2 * exponent + 1)
            factor = 2.0 ** (exponent + up)
        found.append(factor)
    return Tensor("float32", (len(found),), tuple(found))


def rotate(weight: Tensor, size: int) -> Tensor:
    """Blocks of ``size`` columns by butterflies of stride 1, 4, ..., halved at the end: float32."""
    rows = [list(row) for row in weight.rows]
    steps = (size.bit_length() - 1) // 2
    for row in rows:
        for step in range(steps):
            stride = 4**step
            for start in range(len(row)):
                if start // stride % 4:
                    continue
                places = [start + place * stride for place in range(4)]
                a, b, c, d = (row[place] for place in places)
                upper, lower, left, right = _add(a, b), _add(c, -d), _add(c, d), _add(a, -b)
                turned = _add(upper, lower), _add(upper, -lower), _add(left, right)
                for place, value in zip(places, (*turned, _add(left, -right)), strict=True):
                    row[place] = value
    flat = tuple(multiply(value, 0.5**steps) for row in rows for value in row)
    return Tensor("float32", weight.shape, flat)


def _add(a: float, b: float) -> float:
    """In float32; two zeros of one sign keep it, and nothing else is a negative zero."""
    negative = math.copysign(1.0, a) < 0 and math.copysign(1.0, b) < 0
    return FLOAT32.round(Fraction(a) + Fraction(b), -1.0 if negative else 1.0)


def scale_columns(weight: Tensor, factors: Tensor, *, up: bool) -> Tensor:
    """Each column times its factor, or divided by it, in float32."""
    step = multiply if up else divide
    flat = [step(v, factors.flat[j]) for row in weight.rows for j, v in enumerate(row)]
    return Tensor("float32", weight.shape, tuple(flat))
