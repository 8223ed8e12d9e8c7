"""How loops are compiled by numba: none contracts to fused multiply-add unless it says so.

Only the decorators are shared. A compiled function stays in the file of those that call it: numba's
disk cache notices a change of the file that a function is in, and of no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numba

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

inlined: Final[Compile] = numba.njit(nogil=True, error_model="numpy")


def cached(signature: str | None = None) -> Compile:
    """Compiled once a machine, or in every process where there is no folder to cache in."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            kept: Compile = numba.njit(signature, nogil=True, error_model="numpy", cache=True)
            return kept(function)
        except RuntimeError as no_folder:
            if "cannot cache" not in str(no_folder):
                raise
            fresh: Compile = numba.njit(signature, nogil=True, error_model="numpy")
            return fresh(function)

    return decorate
