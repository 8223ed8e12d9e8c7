"""A loader that is of use to somebody, and one that reads little."""

from __future__ import annotations

import torch
from torch import Tensor

from quantrecipe.loaders import Checkpoint, Names
from quantrecipe.schema.capabilities import Capabilities


class Halves:
    """Every weight in float16, whatever was asked for."""

    name = "halves"
    capabilities = Capabilities(
        schema_versions=frozenset({1}),
        formats={
            "bfloat16": frozenset(),
            "float16": frozenset(),
            "int8": frozenset({"tensor", "channel", "group"}),
        },
    )

    def load_state_dict(
        self,
        checkpoint: Checkpoint,
        *,
        part: str | None = None,
        names: Names = "source",
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        opened = checkpoint.part(part)
        return {
            f"{name}.weight": checkpoint.weight(name, part, torch.float16)
            for name in opened.modules
        }


class Narrow(Halves):
    """Knows plain numbers only."""

    name = "narrow"
    capabilities = Capabilities(schema_versions=frozenset({1}), formats={"bfloat16": frozenset()})
