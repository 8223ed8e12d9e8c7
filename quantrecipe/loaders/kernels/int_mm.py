"""The kernel on ``torch._int_mm``: int8 products by the vendor's library, scaled afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from quantrecipe.loaders.kernels.arithmetic import quantize_activations, smoothed
from quantrecipe.loaders.kernels.call import LinearCall


class IntMmKernel:
    """W8A8 with scales by row, for CPUs and for CUDA without Triton."""

    name = "int_mm"

    def refuses(self, call: LinearCall) -> str | None:
        if not call.is_w8a8:
            return "it computes products of int8 codes whose weight has a scale for each row"
        if call.device.type != "cpu":
            return f"it does not run on {call.device.type}"
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
        codes, scale = quantize_activations(smoothed(x, smoothing), call.activation)
        result = torch._int_mm(codes, weight.T).float()
        result = result.mul_(scale).mul_(weight_scale.float().T)
        if bias is not None:
            result = result.add_(bias.float())
        return result.to(call.dtype)
