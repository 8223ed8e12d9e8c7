"""What the metadata of a file say of its modules, for readers that look there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.markers import COMFYUI_KEY, comfyui_metadata
from quantrecipe.schema.plan import PlannedModule
from quantrecipe.schema.plan_drafts import Draft, decoded_dtype
from quantrecipe.schema.plan_metadata import TORCHAO_KEY
from quantrecipe.schema.schemes import NvFp4, ScaledWeight

_PARTS: Final = frozenset({"weight_scale", "second_scale", "zeros"})
"""Roles of tensors that torchao takes for parts of a weight."""

_BY_TOKEN: Final[Mapping[str, Any]] = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    },
}


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
    """The logical name of every tensor, and the class and parts of each (torchao 0.18).

    Its reader wants a dot in every name that is listed, and hands on tensors that are not.
    """
    found: dict[str, str] = {}
    for draft in drafts:
        module = draft.module
        quantized = module is not None and isinstance(module.weight, ScaledWeight)
        for role, output in draft.outputs.items():
            if quantized and role in _PARTS:
                continue
            name, said = output.name, {"_type": "Tensor"}
            if quantized and role == "weight" and module is not None:
                name = output.name.replace("._weight_qdata", ".weight")
                said = _subclass(module)
            if "." in name:
                found[name] = json.dumps(said)
    return {TORCHAO_KEY: json.dumps(sorted(found)), **found}


def _subclass(module: PlannedModule) -> dict[str, Any]:
    dtype = {"_type": "torch.dtype", "_data": decoded_dtype(module.source)}
    block: dict[str, Any] = {"block_size": [1, module.source.in_features]}
    if module.weight.format == "int8":
        kwargs = None if module.activation is None else _BY_TOKEN
        return {
            "_type": "Int8Tensor",
            "_data": {"act_quant_kwargs": kwargs, "reduce_range": False, **block, "dtype": dtype},
            "_tensor_data_names": ["zero_point", "qdata", "scale"],
        }
    if isinstance(module.weight, NvFp4):
        return {
            "_type": "NVFP4Tensor",
            "_data": {
                "is_swizzled_scales": True,
                "use_triton_kernel": False,
                "act_quant_kwargs": None,
                "block_size": module.weight.group_size,
                "orig_dtype": dtype,
            },
            "_tensor_data_names": ["per_tensor_scale", "qdata", "scale"],
        }
    return {
        "_type": "Float8Tensor",
        "_data": {
            **block,
            "mm_config": None,
            "act_quant_kwargs": None,
            "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
            "dtype": dtype,
        },
        "_tensor_data_names": ["qdata", "scale"],
    }
