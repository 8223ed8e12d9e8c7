"""Element types: the names used in recipes (torch's), their safetensors codes, and their sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

PlainDType = Literal["float64", "float32", "float16", "bfloat16"]
PLAIN_DTYPES: Final[tuple[PlainDType, ...]] = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: the name recipes and layouts use; equal to torch's where torch has the type.
        code: the name in a safetensors header.
        bits: size of one element, in bits (sub-byte types are packed).
    """

    name: str
    code: str
    bits: int


@dataclass(frozen=True, slots=True)
class BlockDType:
    """A type whose elements lie in records of a fixed size, along the last dimension.

    Attributes:
        name: the name recipes and layouts use, which is that of the format.
        numbers: elements in a record.
        nbytes: size of a record, in bytes.
    """

    name: str
    numbers: int
    nbytes: int


# Ascending in the order by which safetensors ranks dtypes; a writer sorts tensors by this rank
# descending, then by name, so every tensor stays aligned to its own element size.
_RANKED: Final = (
    DType("bool", "BOOL", 8),
    DType("float4_e2m1fn_x2", "F4", 4),
    DType("float6_e2m3fn", "F6_E2M3", 6),
    DType("float6_e3m2fn", "F6_E3M2", 6),
    DType("uint8", "U8", 8),
    DType("int8", "I8", 8),
    DType("float8_e5m2", "F8_E5M2", 8),
    DType("float8_e4m3fn", "F8_E4M3", 8),
    DType("float8_e8m0fnu", "F8_E8M0", 8),
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", 8),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", 8),
    DType("int16", "I16", 16),
    DType("uint16", "U16", 16),
    DType("float16", "F16", 16),
    DType("bfloat16", "BF16", 16),
    DType("int32", "I32", 32),
    DType("uint32", "U32", 32),
    DType("float32", "F32", 32),
    DType("complex64", "C64", 64),
    DType("float64", "F64", 64),
    DType("int64", "I64", 64),
    DType("uint64", "U64", 64),
)

DTYPES: Final[dict[str, DType]] = {dtype.name: dtype for dtype in _RANKED}
BY_CODE: Final[dict[str, DType]] = {dtype.code: dtype for dtype in _RANKED}
RANK: Final[dict[str, int]] = {dtype.name: rank for rank, dtype in enumerate(_RANKED)}

BLOCK_DTYPES: Final[Mapping[str, BlockDType]] = MappingProxyType(
    {
        dtype.name: dtype
        for dtype in (
            BlockDType("q8_0", 32, 34),
            BlockDType("q4_0", 32, 18),
            BlockDType("q4_k", 256, 144),
            BlockDType("q6_k", 256, 210),
        )
    }
)
"""Types that only GGUF files hold; safetensors has no code for them."""


def is_plain(dtype: str) -> bool:
    """Whether ``dtype`` is a floating type that holds numbers without a scale."""
    return dtype in PLAIN_DTYPES


def byte_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a contiguous tensor of this dtype (a recipe name) and shape takes.

    Raises:
        ValueError: a sub-byte dtype whose elements do not fill whole bytes, or a block dtype whose
            last dimension is no whole number of records.
    """
    block = BLOCK_DTYPES.get(dtype)
    if block is not None:
        if not shape or shape[-1] % block.numbers:
            raise ValueError(f"{dtype} of shape {list(shape)} is no whole number of records")
        return math.prod(shape) // block.numbers * block.nbytes
    bits = DTYPES[dtype].bits * math.prod(shape)
    if bits % 8:
        raise ValueError(f"{dtype} of shape {list(shape)} does not fill whole bytes")
    return bits // 8
