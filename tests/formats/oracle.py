"""The formats once more, in NumPy and from their definitions: what the package is held against.

``python tests/formats/oracle.py`` writes the golden files anew, from this module alone.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

GOLDEN = Path(__file__).parent / "golden"
SMALLEST_NORMAL = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-14}


@dataclass(frozen=True)
class Float8:
    """An fp8 type by its bits: ``values[code]`` for its finite non-negative codes, ascending."""

    exponent_bits: int
    mantissa_bits: int
    finite_codes: int

    @cached_property
    def values(self) -> NDArray[np.float64]:
        bias = 2 ** (self.exponent_bits - 1) - 1
        codes = range(self.finite_codes)
        return np.array([self._value(code, bias) for code in codes], dtype=np.float64)

    def _value(self, code: int, bias: int) -> float:
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        if exponent == 0:
            return float(mantissa * 2.0 ** (1 - bias - self.mantissa_bits))
        return float((1 + mantissa / 2**self.mantissa_bits) * 2.0 ** (exponent - bias))


FLOAT8 = {"float8_e4m3fn": Float8(4, 3, 0x7F), "float8_e5m2": Float8(5, 2, 0x7C)}
E2M1 = Float8(2, 1, 8)


def largest_code(name: str) -> float:
    """127, 448 or 57344."""
    return 127.0 if name == "int8" else float(FLOAT8[name].values[-1])


def round_bfloat16(values: Floats) -> Floats:
    """To nearest, ties to even, by adding to the bits; finite input."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def store_scale(values: Floats, dtype: str) -> Floats:
    """What is read back after storing ``values`` in ``dtype``."""
    if dtype == "bfloat16":
        return round_bfloat16(values)
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    return values


def scale_bytes(values: Floats, dtype: str) -> bytes:
    """Stored scales, little-endian."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if dtype == "float16" else "<f4").tobytes()


def scales(weight: Floats, group: tuple[int, int], name: str, dtype: str) -> Floats:
    """The grid of stored scales, group by group."""
    rows, columns = weight.shape
    starts = [range(0, rows, group[0]), range(0, columns, group[1])]
    grid = np.ones((len(starts[0]), len(starts[1])), dtype=np.float32)
    for i, top in enumerate(starts[0]):
        for j, left in enumerate(starts[1]):
            amax = np.abs(weight[top : top + group[0], left : left + group[1]]).max()
            if amax > 0:
                scale = np.float32(amax) / np.float32(largest_code(name))
                grid[i, j] = max(scale, np.float32(SMALLEST_NORMAL[dtype]))
    return store_scale(grid, dtype)


def clip_search(
    weight: Floats,
    group: tuple[int, int],
    name: str,
    dtype: str,
    ratios: tuple[float, ...],
    importance: Floats,
) -> Floats:
    """The grid of stored scales of the least weighted error, one group and ratio after the other.

    Terms are added as Python's integers, which never overflow.
    """
    rows, columns = weight.shape
    grid = scales(weight, group, name, dtype)
    bits = min(50, 61 - int(np.ceil(np.log2(group[0] * group[1]))))
    for i, top in enumerate(range(0, rows, group[0])):
        for j, left in enumerate(range(0, columns, group[1])):
            block = weight[top : top + group[0], left : left + group[1]]
            counts = importance[left : left + group[1]].astype(np.float64)
            counts = np.ldexp(counts, bits - np.frexp(counts.max())[1])
            unit = np.frexp(np.float64(np.abs(block).max()))[1]
            least = None
            for ratio in ratios:
                clipped = np.array([[np.abs(block).max() * np.float32(ratio)]], np.float32)
                scale = scales(clipped, (1, 1), name, dtype)
                error = decode(encode(block, scale, name), scale, name) - block
                terms = np.rint(np.ldexp(error.astype(np.float64), -unit) ** 2 * counts)
                total = sum(int(term) for term in terms.flat)
                if least is None or total < least:
                    least, grid[i, j] = total, scale[0, 0]
    return grid


def spread(grid: Floats, group: tuple[int, int], shape: tuple[int, int]) -> Floats:
    """Each element's own scale."""
    rows = np.arange(shape[0])[:, None] // group[0]
    columns = np.arange(shape[1])[None, :] // group[1]
    each: Floats = grid[rows, columns]
    return each


def encode(weight: Floats, scale: Floats, name: str) -> Codes:
    """Code bytes, for each element's own scale."""
    with np.errstate(over="ignore", under="ignore"):
        ratio = weight / scale
    if name == "int8":
        codes: Codes = np.clip(np.rint(ratio), -127, 127).astype(np.int8).view(np.uint8)
        return codes
    return round_float8(ratio, FLOAT8[name])


def round_float8(ratio: NDArray[Any], kind: Float8, sign: int = 0x80) -> Codes:
    """The nearest finite code; of two equally near, the even one; the sign is kept."""
    values = kind.values
    magnitude = np.minimum(np.abs(ratio.astype(np.float64)), values[-1])
    above = np.minimum(np.searchsorted(values, magnitude), len(values) - 1)
    below = np.maximum(above - 1, 0)
    up, down = values[above] - magnitude, magnitude - values[below]
    even = np.where(above % 2 == 0, above, below)
    code = np.where(up < down, above, np.where(down < up, below, even))
    signed: Codes = (code + np.where(np.signbit(ratio), sign, 0)).astype(np.uint8)
    return signed


def decode(codes: Codes, scale: Floats, name: str) -> Floats:
    """``float32(code) * float32(scale)``, for each element's own scale."""
    with np.errstate(under="ignore"):
        values: Floats = (code_values(codes, name) * scale).astype(np.float32)
    return values


def code_values(codes: Codes, name: str) -> Floats:
    """What finite codes mean, unscaled."""
    if name == "int8":
        return codes.view(np.int8).astype(np.float32)
    magnitude = FLOAT8[name].values[codes & 0x7F]
    values: Floats = np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)
    return values


def power_of_two(amax: float, largest: float, floor: bool) -> float:
    """The scale of an MX block, from exact arithmetic."""
    if amax == 0:
        return 2.0**-127
    exponent = int(np.frexp(amax)[1]) - int(np.frexp(largest)[1])
    if not floor and Fraction(amax) > Fraction(largest) * Fraction(2) ** exponent:
        exponent += 1
    return float(2.0 ** min(max(exponent, -127), 127))


def blocks(weight: Floats, width: int) -> Floats:
    """``[rows, groups, width]``."""
    return weight.reshape(len(weight), -1, width)


def mx(weight: Floats, name: str, floor: bool) -> tuple[Floats, Codes, Floats]:
    """Scales ``[rows, groups, 1]``, codes and values ``[rows, groups, 32]`` of mxfp8 or mxfp4."""
    kind, sign = (FLOAT8["float8_e4m3fn"], 0x80) if name == "mxfp8" else (E2M1, 8)
    w = blocks(weight, 32)
    largest = float(kind.values[-1])
    powers = [power_of_two(float(a), largest, floor) for a in np.abs(w).max(2).flat]
    scale = np.array(powers, np.float32).reshape(w.shape[0], -1, 1)
    # In float64, where dividing by a power of two rounds nothing.
    codes = round_float8(w.astype(np.float64) / scale, kind, sign)
    return scale, codes, _times(codes, kind, sign, scale)


def nvfp4(weight: Floats) -> tuple[np.float32, Codes, Floats, Codes, Floats]:
    """The scale over all; bytes of block scales; both multiplied; codes; values."""
    w = blocks(weight, 16)
    amax = np.abs(w).max(2)
    over_all = np.float32(1)
    if amax.max() > 0:
        over_all = max(amax.max() / np.float32(2688), np.float32(2.0**-126))
    wanted = np.minimum(amax / np.float32(6) / over_all, np.float32(448))
    stored = round_float8(wanted, FLOAT8["float8_e4m3fn"])
    scale = (FLOAT8["float8_e4m3fn"].values[stored].astype(np.float32) * over_all)[:, :, None]
    ratio = np.divide(w, scale, out=np.zeros_like(w), where=scale > 0)
    codes = round_float8(ratio, E2M1, 8)
    return over_all, stored, scale, codes, _times(codes, E2M1, 8, scale)


def llm_int8(weight: Floats) -> tuple[Floats, Codes, Floats]:
    """Row maxima, code bytes and values."""
    scale = np.abs(weight).max(1, keepdims=True)
    factor = (np.float32(1) / np.maximum(scale, np.float32(2.0**-120))) * np.float32(127)
    codes = np.clip(np.rint(weight * factor), -127, 127).astype(np.int8)
    values: Floats = (codes.astype(np.float32) * scale) * np.float32(1 / 127)
    return scale, codes.view(np.uint8), values


def _times(codes: Codes, kind: Float8, sign: int, scale: Floats) -> Floats:
    magnitude = kind.values[codes & (sign - 1)].astype(np.float32)
    with np.errstate(under="ignore"):
        values: Floats = np.where(codes & sign, -magnitude, magnitude) * scale
    return values


def _golden_weight() -> Floats:
    random = np.random.default_rng(7)
    weight = (random.standard_normal((5, 8)) * 0.02).astype(np.float32)
    weight[0] = np.float32(2.0**-7) * np.array([127, -0.5, 0.5, 1.5, -2.5, 63.5, -127, 0])
    weight[2] = 0
    weight[3, 3] = -1.7
    return weight


def golden(name: str) -> dict[str, Any]:
    """A golden file's content: inputs and outputs as hexadecimal little-endian bytes."""
    weight = _golden_weight()
    groups: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
        "tensor": (weight.shape, {}),
        "channel": ((1, 8), {}),
    }
    if name == "int8":
        groups["group"] = ((1, 4), {"group_size": 4})
    else:
        groups["block"] = ((2, 3), {"block_size": [2, 3]})
    cases = []
    for granularity, (group, extra) in groups.items():
        for dtype in SMALLEST_NORMAL:
            grid = scales(weight, group, name, dtype)
            each = spread(grid, group, weight.shape)
            codes = encode(weight, each, name)
            spec = {"format": name, "granularity": granularity, "scale_dtype": dtype} | extra
            cases.append(
                {
                    "spec": spec,
                    "scale": scale_bytes(grid, dtype).hex(),
                    "codes": codes.tobytes().hex(),
                    "decoded": decode(codes, each, name).astype("<f4").tobytes().hex(),
                }
            )
    return {"shape": list(weight.shape), "weight": weight.tobytes().hex(), "cases": cases}


def golden_clip_search() -> dict[str, Any]:
    """Every format with the quantizer clip-search, with and without importance."""
    weight = _golden_weight()
    importance = np.array([4, 1, 0.25, 1, 30, 0, 0.1, 1], np.float32)
    ratios = tuple(1 - step * (1 - 0.5) / 8 for step in range(9))
    cases = []
    for name, granularity, group, extra in (
        ("int8", "channel", (1, 8), {}),
        ("int8", "group", (1, 4), {"group_size": 4}),
        ("float8_e4m3fn", "channel", (1, 8), {}),
        ("float8_e5m2", "block", (2, 3), {"block_size": [2, 3]}),
    ):
        for dtype in SMALLEST_NORMAL:
            for weights in (None, importance):
                counts = np.ones(8, np.float32) if weights is None else weights
                grid = clip_search(weight, group, name, dtype, ratios, counts)
                codes = encode(weight, spread(grid, group, weight.shape), name)
                quantizer = {"kind": "clip-search", "min_clip_ratio": 0.5, "steps": 8}
                spec: dict[str, Any] = {"format": name, "granularity": granularity}
                spec |= {"scale_dtype": dtype, "quantizer": quantizer} | extra
                cases.append(
                    {
                        "spec": spec,
                        "importance": None if weights is None else weights.tolist(),
                        "scale": scale_bytes(grid, dtype).hex(),
                        "codes": codes.tobytes().hex(),
                    }
                )
    return {"shape": list(weight.shape), "weight": weight.tobytes().hex(), "cases": cases}


def golden_blocks() -> dict[str, Any]:
    """Formats of blocks of their own, for a weight with ties, zeros and an outlier."""
    random = np.random.default_rng(11)
    weight = (random.standard_normal((4, 64)) * 0.02).astype(np.float32)
    weight[0] = np.float32(2.0**-9) * np.array([*np.arange(-31, 32) / 4, 7])
    weight[1, 16:48] = 0
    weight[2, 40] = 3
    cases = []
    for name, quantizer in itertools.product(("mxfp8", "mxfp4"), ("absmax", "ocp-floor")):
        scale, codes, values = mx(weight, name, quantizer == "ocp-floor")
        spec = {"format": name, "granularity": "group", "quantizer": {"kind": quantizer}}
        exponents = (scale.view(np.uint32) >> 23).astype(np.uint8)
        cases.append(_block_case(spec, exponents.tobytes(), codes, values))
    over_all, stored, _, codes, values = nvfp4(weight)
    case = _block_case({"format": "nvfp4", "granularity": "group"}, stored.tobytes(), codes, values)
    cases.append(case | {"second": over_all.astype("<f4").tobytes().hex()})
    maxima, codes, values = llm_int8(weight)
    spec = {"format": "llm_int8", "granularity": "channel"}
    cases.append(_block_case(spec, maxima.astype("<f4").tobytes(), codes, values))
    return {"shape": list(weight.shape), "weight": weight.tobytes().hex(), "cases": cases}


def _block_case(spec: dict[str, Any], scale: bytes, codes: Codes, values: Floats) -> dict[str, Any]:
    return {
        "spec": spec,
        "scale": scale.hex(),
        "codes": codes.tobytes().hex(),
        "decoded": values.astype("<f4").tobytes().hex(),
    }


def golden_plain() -> dict[str, Any]:
    """float32 in every plain dtype."""
    weight = _golden_weight()
    return {
        "shape": list(weight.shape),
        "weight": weight.tobytes().hex(),
        "float64": weight.astype("<f8").tobytes().hex(),
        "float32": weight.astype("<f4").tobytes().hex(),
        "float16": weight.astype("<f2").tobytes().hex(),
        "bfloat16": scale_bytes(round_bfloat16(weight), "bfloat16").hex(),
    }


def main() -> None:
    for name in ("int8", *FLOAT8):
        _write(name, golden(name))
    _write("clip_search", golden_clip_search())
    _write("blocks", golden_blocks())
    _write("plain", golden_plain())


def _write(name: str, content: dict[str, Any]) -> None:
    (GOLDEN / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
