"""The ``quantization_config`` that compressed-tensors reads, and transformers and vLLM through it.

A config group for each scheme, with the exact names of its modules as targets: no pattern has to
match the same modules in another program.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from quantrecipe.schema.quantization_config import ConfiguredModule, by_scheme
from quantrecipe.schema.schemes import DynamicActivation, Float8Block, ScaledWeight

_VERSION: Final = "0.20.0"
_COMPRESSION: Final = {
    "int8": "int-quantized",
    "float8_e4m3fn": "float-quantized",
    "int4": "pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
_BITS: Final = {"int4": 4, "mxfp4": 4, "nvfp4": 4}
_FLOATS: Final = ("float8_e4m3fn", "mxfp8", "mxfp4", "nvfp4")
_SCALES: Final = {
    "mxfp8": "torch.uint8",
    "mxfp4": "torch.uint8",
    "nvfp4": "torch.float8_e4m3fn",
}


def compressed_tensors_config(modules: Iterable[ConfiguredModule]) -> dict[str, Any] | None:
    """The ``quantization_config`` of one part as JSON values; ``None`` if all of it is plain.

    Args:
        modules: of the part, in any order; plain ones are listed as ignored.
    """
    kept = tuple(modules)
    found = by_scheme(kept)
    if not found:
        return None
    groups = {f"group_{number}": _group(found[name]) for number, name in enumerate(sorted(found))}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "version": _VERSION,
        "ignore": sorted(m.name for m in kept if not isinstance(m.weight, ScaledWeight)),
        "config_groups": groups,
    }


def _group(modules: list[ConfiguredModule]) -> dict[str, Any]:
    weight, activation = modules[0].weight, modules[0].activation
    assert isinstance(weight, ScaledWeight)
    return {
        "targets": [module.name for module in modules],
        "format": _COMPRESSION[weight.format],
        "weights": _weights(weight),
        "input_activations": None if activation is None else _inputs(activation),
    }


def _weights(weight: ScaledWeight) -> dict[str, Any]:
    said: dict[str, Any] = {
        "num_bits": _BITS.get(weight.format, 8),
        "type": "float" if weight.format in _FLOATS else "int",
        "symmetric": not weight.has_zero_points,
        # The word for groups under a scale of their own level.
        "strategy": "tensor_group" if weight.has_two_levels else weight.granularity,
        "dynamic": False,
    }
    if weight.granularity == "group":
        said["group_size"] = weight.group_shape(1, 1)[1]
    if isinstance(weight, Float8Block):
        said["block_structure"] = list(weight.block_size)
    if weight.format in _SCALES:
        said["scale_dtype"] = _SCALES[weight.format]
    return said


def _inputs(activation: DynamicActivation) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "int" if activation.format == "int8" else "float",
        "symmetric": True,
        "strategy": activation.granularity,
        "dynamic": True,
    }
