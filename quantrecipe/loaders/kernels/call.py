"""One call of a quantized linear, as a kernel sees it before it looks at a number."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantrecipe.schema.schemes import DynamicActivation


def activation_key(activation: DynamicActivation | None) -> str:
    """How the operator is told of an activation format: ``int8:token``, or nothing for none."""
    return "" if activation is None else f"{activation.format}:{activation.granularity}"


@dataclass(frozen=True, slots=True)
class LinearCall:
    """What a kernel may decide by.

    Attributes:
        rows: rows of the activations (M), all leading dimensions taken together.
        out_features: rows of the weight (N).
        in_features: columns of the weight (K).
        dtype: of the activations and of the result.
        device: where all tensors are.
        code_dtype: of the weight as it is handed over: int8 or a float8; int8 for int4 and float32
            for nf4, whose codes are unpacked.
        scale_dtype: of the weight's scales.
        group: rows and columns of the weight that share a scale.
        activation: ``FORMAT:GRANULARITY`` of the activations' codes, or empty for none.
        smoothing: whether activations are divided by factors.
        rotation: input features in a block that is rotated after that; 0 if none is.
        bias: whether a bias is added.
    """

    rows: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device
    code_dtype: torch.dtype
    scale_dtype: torch.dtype
    group: tuple[int, int]
    activation: str
    smoothing: bool
    rotation: int
    bias: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Scales along out and in."""
        rows, columns = self.group
        return -(-self.out_features // rows), -(-self.in_features // columns)

    @property
    def by_row(self) -> bool:
        """Whether a row of the weight has one scale, its own or everybody's."""
        return self.grid[1] == 1 and self.grid[0] in (1, self.out_features)

    @property
    def is_w8a8(self) -> bool:
        """Whether the product is one of int8 codes, scaled by row and by token."""
        return self.activation.startswith("int8:") and self.code_dtype == torch.int8 and self.by_row
