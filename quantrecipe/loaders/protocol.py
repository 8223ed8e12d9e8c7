"""What a loader is."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from quantrecipe.loaders.checkpoint import Checkpoint
from quantrecipe.schema.capabilities import Capabilities

Names = Literal["source", "target"]
"""Under which names: those of the checkpoint that was converted, or of the one that was written."""


@runtime_checkable
class Loader(Protocol):
    """Takes a converted checkpoint and produces tensors.

    Found by entry point (group ``quantrecipe.loaders``), chosen by name; an instance is made
    without arguments.
    """

    @property
    def name(self) -> str:
        """What it is chosen by."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can read."""

    def load_state_dict(
        self,
        checkpoint: Checkpoint,
        *,
        part: str | None = None,
        names: Names = "source",
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """Every tensor of a part, quantized weights as the numbers that they stand for.

        Args:
            checkpoint: opened and checked.
            part: which part; ``None``: the only one, or all of them where ``names`` tells them
                apart.
            names: whose names the keys are.
            dtype: of the weights that were quantized; every other tensor keeps its own.
        """
