"""Which kernel computes a call."""

from __future__ import annotations

import warnings
from functools import cache, lru_cache
from typing import Any, Final

import torch

from quantrecipe.loaders.kernels.call import LinearCall
from quantrecipe.loaders.kernels.on_cpu import multiplies
from quantrecipe.loaders.kernels.protocol import Kernel
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.registry import entry_points_by_name, load_named

GROUP: Final = "quantrecipe.kernels"
AUTO: Final = "auto"
_IN_ORDER: Final[tuple[str, ...]] = ("triton", "int_mm", "dequantized")
"""What ``auto`` tries; the first that does not refuse a call computes it."""
AUTO_OR_DEQUANTIZED: Final = "auto+dequantized"
"""``auto``, which may also take ``dequantized`` for W8A8 where that is faster: products of
dequantized numbers in the activations' dtype, in place of exact sums of codes."""
_MANY_ROWS: Final = 1024
"""From here on dequantizing the weight is a small part of a multiplication."""


def kernel_names() -> list[str]:
    """Every kernel that is installed; ``auto`` beside them takes the fastest that fits a call."""
    return sorted(entry_points_by_name(GROUP))


@cache
def find_kernel(name: str) -> Kernel:
    """A kernel by name.

    Raises:
        InvalidInput: none is called that, or what is registered is no kernel.
    """
    made: Any = load_named(GROUP, name, "kernel")()
    if not isinstance(made, Kernel):
        raise InvalidInput(
            Problem(
                "not-a-kernel",
                f"what is registered as kernel {name!r} lacks a name, a refuses or a linear method",
                hint="quantrecipe.loaders.kernels.Kernel says what one needs.",
            )
        )
    return made


@lru_cache(maxsize=4096)
def choose(call: LinearCall, name: str) -> Kernel:
    """The kernel that computes ``call``.

    Args:
        call: what is to be computed.
        name: a kernel's name, ``auto`` or ``auto+dequantized``.

    Raises:
        InvalidInput: no kernel is called that, or it refuses the call.
    """
    if name in (AUTO, AUTO_OR_DEQUANTIZED):
        order = _IN_ORDER
        if dequantized_is_faster(call):
            if name == AUTO_OR_DEQUANTIZED:
                order = ("dequantized",)
            elif call.device.type == "cuda":
                warnings.warn(
                    "int8 products are slow on this GPU: dequantized weights are faster with "
                    f'kernel="{AUTO_OR_DEQUANTIZED}", which rounds differently',
                    stacklevel=2,
                )
        return next(kernel for kernel in map(find_kernel, order) if kernel.refuses(call) is None)
    kernel = find_kernel(name)
    reason = kernel.refuses(call)
    if reason is None:
        return kernel
    raise InvalidInput(
        Problem(
            "kernel-refuses",
            f"kernel {name!r} cannot compute this: {reason}",
            hint='kernel="auto" takes one that can.',
        )
    )


def dequantized_is_faster(call: LinearCall) -> bool:
    """Whether ``dequantized`` computes a W8A8 call faster than any kernel on int8 codes.

    On GPUs from compute capability 10 on, whose int8 instructions are those of Ampere, with many
    rows. On CPUs that do not multiply int8, where exact sums take float32 in short runs.
    """
    if not call.is_w8a8:
        return False
    if call.device.type == "cpu":
        return not multiplies(torch.int8)
    if call.device.type == "cuda" and call.rows >= _MANY_ROWS:
        return torch.cuda.get_device_capability(call.device) >= (10, 0)
    return False
