"""The numeric formats in words, from the models that recipes are checked with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Final, get_args

from quantrecipe.schema.dtypes import BLOCK_DTYPES, DTYPES, PLAIN_DTYPES
from quantrecipe.schema.schemes import (
    CODE_DTYPES,
    PACKED_FORMATS,
    AnyScaledWeight,
    FormatName,
    PlainWeight,
    ScaledWeight,
)


@dataclass(frozen=True, slots=True)
class Granularity:
    """One way of sharing scales: its name, and in words what shares one."""

    name: str
    meaning: str


@dataclass(frozen=True, slots=True)
class FormatFacts:
    """What a format is.

    Attributes:
        name: the name recipes use.
        summary: one sentence.
        bits: of a stored number, scales not counted.
        granularities: how scales are shared; empty where there are none.
        scale_dtypes: what scales may be stored in.
        stored: the tensors that a weight becomes.
        bound: how far a number may be from what is read back, in words.
    """

    name: str
    summary: str
    bits: int
    granularities: tuple[Granularity, ...]
    scale_dtypes: tuple[str, ...]
    stored: str
    bound: str

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


_NIBBLES: Final = (
    "the codes of [out, in], several in one number as the layout packs them, and a scale for each "
    "group; codes are computed from the scale as stored"
)
_CODES: Final = (
    "the codes [out, in] and a scale for each group; scales are stored first, and codes are "
    "computed from the scale as stored"
)
_RECORDS: Final = "records of codes and their scales, row after row"
_SUMMARIES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "float64": "IEEE double precision.",
        "float32": "IEEE single precision.",
        "float16": "IEEE half precision: 11 significant bits, largest number 65504.",
        "bfloat16": "The upper half of a float32: 8 significant bits, the range of float32.",
        "int8": "Signed 8-bit codes in [-127, 127] times a scale; zero is code 0.",
        "float8_e4m3fn": "8-bit floats of 4 significant bits, up to 448, times a scale.",
        "float8_e5m2": "8-bit floats of 3 significant bits, up to 57344, times a scale.",
        "int4": "4-bit codes times a scale, symmetric or counted from a zero point of each group.",
        "nf4": "4-bit codes for 16 quantiles of a normal distribution, as in bitsandbytes.",
        "llm_int8": "Signed 8-bit codes in [-127, 127] times absmax / 127 of the row: LLM.int8().",
        "mxfp8": "8-bit floats (e4m3) times a power of two for each 32: OCP Microscaling.",
        "mxfp4": "4-bit floats (e2m1) times a power of two for each 32: OCP Microscaling.",
        "nvfp4": "4-bit floats (e2m1) times an fp8 scale for each 16, times one scale for all.",
        "q8_0": "Records of ggml: 32 signed 8-bit codes and a float16 scale.",
        "q4_0": "Records of ggml: 32 codes of 4 bits and a float16 scale.",
        "q4_k": "Records of ggml: 8 runs of 32 codes of 4 bits, each with a scale and a minimum.",
        "q6_k": "Records of ggml: 16 runs of 16 codes of 6 bits, each with a scale.",
    }
)
_BOUNDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "float64": "exact for every dtype that is read",
        "float32": "exact, but for float64: half a unit in the last of 24 bits",
        "float16": "half a unit in the last of 11 bits, 2^-25 below 2^-14; beyond 65504 is refused",
        "bfloat16": "half a unit in the last of 8 bits; exact for fp8",
        "int8": "half a scale: s (1/2 + 127 * 2^-23), where s = stored(absmax / 127) is normal",
        "float8_e4m3fn": "max(|w| / 17, s / 1024), and nowhere more than 16 s, where s = "
        "stored(absmax / 448) is normal",
        "float8_e5m2": "max(|w| / 9, s / 131072), where s = stored(absmax / 57344) is normal",
        "int4": "half a scale, where s = stored(absmax / 7) is normal; with zero points "
        "s (1/2 + 15 u), where s = stored((high - low) / 15) and u rounds the stored dtype",
        "nf4": "0.1519036 of the block's absolute maximum below zero, 0.1385216 above",
        "llm_int8": "half of absmax / 127",
        "mxfp8": "absmax / 17 of the group, an eighth with ocp-floor",
        "mxfp4": "absmax / 5 of the group, a quarter with ocp-floor",
        "nvfp4": "max(s, absmax - 6 s) with the scale s as stored",
        "q8_0": "half a scale and what rounding it to float16 adds",
        "q4_0": "a scale: s (1 + 8 * 2^-11)",
        "q4_k": "the distance to the nearest of the 16 numbers that the record's scales reach",
        "q6_k": "the distance to the nearest of the 64 numbers that the record's scales reach",
    }
)


def format_names() -> list[str]:
    """Every format that a recipe can name, in the order of the schema."""
    return list(get_args(FormatName))


def format_facts(name: str) -> FormatFacts:
    """What is known of a format; ``name`` is one of ``format_names``."""
    scaled = [model for model in get_args(AnyScaledWeight) if name in _formats_of(model)]
    return FormatFacts(
        name=name,
        summary=_SUMMARIES[name],
        bits=_bits(name),
        granularities=tuple(
            Granularity(str(_literal(model, "granularity")[0]), _first(model)) for model in scaled
        ),
        scale_dtypes=_literal(scaled[0], "scale_dtype") if scaled else (),
        stored=_stored(name),
        bound=_BOUNDS[name],
    )


def _bits(name: str) -> int:
    if name in PACKED_FORMATS:
        return 4
    if name in BLOCK_DTYPES:
        return {"q8_0": 8, "q4_0": 4, "q4_k": 4, "q6_k": 6}[name]
    return DTYPES[CODE_DTYPES.get(name, name)].bits


def _stored(name: str) -> str:
    if name in BLOCK_DTYPES:
        return _RECORDS
    if name in PLAIN_DTYPES:
        return "the numbers themselves, [out, in]"
    return _NIBBLES if name in PACKED_FORMATS else _CODES


def _formats_of(model: type[ScaledWeight | PlainWeight]) -> tuple[str, ...]:
    return _literal(model, "format")


def _literal(model: type[ScaledWeight | PlainWeight], field: str) -> tuple[str, ...]:
    """What a field may be."""
    return tuple(get_args(model.model_fields[field].annotation))


def _first(model: type[ScaledWeight]) -> str:
    """The meaning in a model's own words, without the format's name in front."""
    return (model.__doc__ or "").partition(", ")[2].rstrip(".").replace("``", "")
