"""The kernel for whatever has no better one: weights become plain numbers, call by call."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from quantrecipe.loaders.kernels.arithmetic import (
    dequantize_weight,
    quantize_activations,
    smoothed,
)
from quantrecipe.loaders.kernels.call import LinearCall


class DequantizedKernel:
    """Dequantizes the weight into the activations' dtype and multiplies there.

    Activation formats are honoured by rounding activations to their codes and back. With W8A8 in
    a 16-bit dtype that rounds twice: the other kernels are closer to the definition, and faster.
    """

    name = "dequantized"

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
        values = x if smoothing is None else smoothed(x, smoothing)
        if call.activation:
            codes, scale = quantize_activations(values.float(), call.activation)
            values = codes.float() * scale
        plain = dequantize_weight(weight, weight_scale, call.group, call.dtype)
        return functional.linear(
            values.to(call.dtype), plain, None if bias is None else bias.to(call.dtype)
        )
