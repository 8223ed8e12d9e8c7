"""What the metadata of a file say of its modules, for readers that look there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.markers import COMFYUI_KEY, comfyui_metadata
from quantrecipe.schema.plan_drafts import Draft
from quantrecipe.schema.plan_metadata import TORCHAO_KEY
from quantrecipe.schema.schemes import DynamicActivation, ScaledWeight


def module_metadata(layout: Layout, drafts: Iterable[Draft]) -> Mapping[str, str]:
    """Entries of the metadata of one file.

    Args:
        layout: the target's.
        drafts: all that goes into the file.
    """
    if layout.module_metadata == "comfyui":
        said = [
            (draft.outputs["marker"].name.rpartition(".")[0], draft.module.marker)
            for draft in drafts
            if draft.module is not None and draft.module.marker is not None
        ]
        return {COMFYUI_KEY: comfyui_metadata(said)} if said else {}
    if layout.module_metadata == "torchao":
        return _torchao(drafts)
    return {}


def _torchao(drafts: Iterable[Draft]) -> Mapping[str, str]:
    """The logical name of every tensor, and the class and parts of each (torchao 0.18)."""
    found: dict[str, str] = {}
    for draft in drafts:
        module = draft.module
        for role, output in draft.outputs.items():
            if role in ("weight_scale", "zeros"):
                continue
            name, said = output.name, {"_type": "Tensor"}
            if role == "weight" and module is not None and isinstance(module.weight, ScaledWeight):
                name = output.name.replace("._weight_qdata", ".weight")
                said = _subclass(module.weight.format, output.shape[1], module.activation)
            found[name] = json.dumps(said)
    return {TORCHAO_KEY: json.dumps(sorted(found)), **found}


def _subclass(name: str, columns: int, activation: DynamicActivation | None) -> dict[str, Any]:
    dtype = {"_type": "torch.dtype", "_data": "bfloat16"}
    if name != "int8":
        preference = {"_type": "KernelPreference", "_data": "AUTO"}
        data = {
            "block_size": [1, columns],
            "mm_config": None,
            "act_quant_kwargs": None,
            "kernel_preference": preference,
            "dtype": dtype,
        }
        return {"_type": "Float8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]}
    kwargs = None
    if activation is not None:
        kwargs = {
            "_type": "QuantizeTensorToInt8Kwargs",
            "_data": {
                "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
                "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
                "reduce_range": False,
            },
        }
    return {
        "_type": "Int8Tensor",
        "_data": {
            "act_quant_kwargs": kwargs,
            "reduce_range": False,
            "block_size": [1, columns],
            "dtype": dtype,
        },
        "_tensor_data_names": ["zero_point", "qdata", "scale"],
    }
