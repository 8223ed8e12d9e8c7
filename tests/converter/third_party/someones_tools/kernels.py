"""A kernel that multiplies the other way round, and takes no activation formats."""

from __future__ import annotations

from torch import Tensor

from quantrecipe.loaders.kernels import LinearCall


class Transposing:
    """Weight-only, by row, not rotated: ``(W x^T)^T``."""

    name = "transposing"

    def refuses(self, call: LinearCall) -> str | None:
        if call.rotation:
            return "it does not rotate activations"
        return "it takes no activation formats" if call.activation or not call.by_row else None

    def linear(
        self,
        call: LinearCall,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        smoothing: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        values = x.double() if smoothing is None else x.double() / smoothing
        result = (weight.double() @ values.T).T * weight_scale.double().T
        if bias is not None:
            result = result + bias
        return result.to(call.dtype).contiguous()
