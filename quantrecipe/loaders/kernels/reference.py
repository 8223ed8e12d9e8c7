"""The kernel that the others are held to: exact sums, float64 elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from quantrecipe.formats.rotation import rotate_
from quantrecipe.loaders.kernels.arithmetic import (
    expand_scales,
    quantize_activations,
    smoothed,
)
from quantrecipe.loaders.kernels.call import LinearCall


class ReferenceKernel:
    """By definition, slowly, on any device.

    Sums of int8 products are exact: float64 holds every integer below 2^53, and ``in_features``
    products of magnitude 2^14 stay below that for every weight that fits into memory.
    """

    name = "reference"

    def refuses(self, call: LinearCall) -> str | None:
        return None

    def linear(
        self,
        call: LinearCall,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        smoothing: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        values = smoothed(x, smoothing)
        if call.rotation:
            # The definition; elsewhere a library may add in another order.
            values = rotate_(values.clone(memory_format=torch.contiguous_format), call.rotation)
        factors = expand_scales(weight_scale.double(), call.group, weight.shape)
        if not call.activation:
            result = values.double() @ (weight.double() * factors).T
        else:
            codes, scale = quantize_activations(values, call.activation)
            if call.by_row:
                result = (codes.double() @ weight.double().T) * scale.double() * factors.T
            else:
                result = (codes.double() @ (weight.double() * factors).T) * scale.double()
        if bias is not None:
            result = result + bias.double()
        return result.to(call.dtype)
