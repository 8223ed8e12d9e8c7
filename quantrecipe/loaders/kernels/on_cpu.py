"""What the kernels share on CPUs: what the processor can do, and blocks that stay in its cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

_ANY_OF: Final = {
    torch.int8: ("avx512_vnni",),
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
    torch.float32: (),
    torch.float64: (),
}


_WEIGHTS: Final = 1 << 20
_FEWEST: Final = 64
_kept: Final = threading.local()


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of ``dtype`` faster than the same in float32.

    Without the instructions for it torch is many times slower than in float32, or, with int8, adds
    products in 16 bits that saturate. Where torch is too old to say, the answer is no.
    """
    tell: Any = getattr(torch.cpu, "get_capabilities", dict)
    able = tell()
    return not _ANY_OF[dtype] or any(able.get(feature, False) for feature in _ANY_OF[dtype])


def blocks(length: int, step: int) -> Iterator[slice]:
    """``range(length)`` in slices of ``step``; the last may be shorter."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def weights_at_a_time(out_features: int, in_features: int) -> int:
    """How many rows of a weight to turn into float32 before multiplying by them.

    They are still in cache then, and enough for a multiplication to be worth its start.
    """
    return min(out_features, max(_FEWEST, _WEIGHTS // in_features))


def scratch(rows: int, columns: int) -> Tensor:
    """A float32 matrix of any numbers, this thread's until it asks for the next one.

    Memory that every call gave back would have to be mapped anew by the next: with few rows of
    activations that takes longer than the call.
    """
    wanted = rows * columns
    buffer: Tensor | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < wanted:
        with torch.inference_mode(False):  # who comes next may not be in inference mode
            buffer = _kept.buffer = torch.empty(wanted, device="cpu", dtype=torch.float32)
    return buffer[:wanted].view(rows, columns)
