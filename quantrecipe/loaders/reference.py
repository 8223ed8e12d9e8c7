"""The reference loader: the oracle of what a checkpoint means."""

from __future__ import annotations

import torch
from torch import Tensor

from quantrecipe.loaders.checkpoint import Checkpoint
from quantrecipe.loaders.protocol import Names
from quantrecipe.schema.capabilities import BUILT_IN
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import fill_template
from quantrecipe.schema.layout_writing import holds_many_parts, other_name
from quantrecipe.schema.problems import InvalidInput, Problem


class ReferenceLoader:
    """Dequantizes every weight by the definition of its format, in float32."""

    name = "reference"
    capabilities = BUILT_IN

    def load_state_dict(
        self,
        checkpoint: Checkpoint,
        *,
        part: str | None = None,
        names: Names = "source",
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """See ``Loader.load_state_dict``."""
        layout = checkpoint.layout
        if names == "source" and checkpoint.source_layout is not None:
            layout = checkpoint.source_layout
        found: dict[str, Tensor] = {}
        for each in _chosen(checkpoint, part, layout):
            opened = checkpoint.parts[each]
            plain = layout.modules.plain
            for name, module in opened.modules.items():
                weight = checkpoint.weight(name, each, dtype)
                found[_name(plain.weight.name, each, name)] = weight
                if "bias" in module.tensors and plain.bias is not None:
                    bias = checkpoint.tensor(module.tensors["bias"])
                    found[_name(plain.bias.name, each, name)] = bias
            for name, info in opened.others.items():
                found[other_name(layout, each, name)] = checkpoint.tensor(info)
        return found


def _name(template: str, part: str, module: str) -> str:
    return fill_template(template, part, "module", module)


def _chosen(checkpoint: Checkpoint, part: str | None, layout: Layout) -> list[str]:
    if part is not None:
        checkpoint.part(part)
        return [part]
    if len(checkpoint.parts) > 1 and not holds_many_parts(layout):
        raise InvalidInput(
            Problem(
                "which-part",
                f"the names of layout {layout.name!r} do not tell its parts apart: "
                f"{', '.join(checkpoint.parts)}",
                hint='Say which one (part=), or take names="target" if those do.',
            )
        )
    return list(checkpoint.parts)
