"""Kernels that compute with quantized weights, behind one operator that torch knows.

``torch.ops.quantrecipe.linear`` exists once this is imported.
"""

from __future__ import annotations

from quantrecipe.loaders.kernels import operator as _operator
from quantrecipe.loaders.kernels.call import LinearCall, activation_key
from quantrecipe.loaders.kernels.choosing import (
    AUTO,
    AUTO_OR_DEQUANTIZED,
    choose,
    find_kernel,
    kernel_names,
)
from quantrecipe.loaders.kernels.operator import LEVEL_DTYPES
from quantrecipe.loaders.kernels.protocol import Kernel

__all__ = [
    "AUTO",
    "AUTO_OR_DEQUANTIZED",
    "LEVEL_DTYPES",
    "Kernel",
    "LinearCall",
    "activation_key",
    "choose",
    "find_kernel",
    "kernel_names",
]

del _operator
