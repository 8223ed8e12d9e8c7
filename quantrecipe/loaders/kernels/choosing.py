"""Which kernel computes a call."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, Final

from quantrecipe.loaders.kernels.call import LinearCall
from quantrecipe.loaders.kernels.protocol import Kernel
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.registry import entry_points_by_name, load_named

GROUP: Final = "quantrecipe.kernels"
AUTO: Final = "auto"
AUTO_DEQUANTIZED: Final = "auto+dequantized"
"""``auto`` where weights may also be held as plain numbers."""

_IN_ORDER: Final = ("triton", "int_mm", "dequantized")
"""What ``auto`` tries; the first that does not refuse a call computes it."""


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
        name: a kernel's name, or ``auto``.

    Raises:
        InvalidInput: no kernel is called that, or it refuses the call.
    """
    if name not in (AUTO, AUTO_DEQUANTIZED):
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
    return next(kernel for kernel in map(find_kernel, _IN_ORDER) if kernel.refuses(call) is None)
