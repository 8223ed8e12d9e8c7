"""torch's dtypes by the names that recipes use."""

from __future__ import annotations

from typing import Final

import torch

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    name: getattr(torch, name)
    for name in (
        "bool",
        "uint8",
        "int8",
        "int16",
        "uint16",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e8m0fnu",
    )
    if hasattr(torch, name)
}
"""Every dtype that this version of torch has."""
