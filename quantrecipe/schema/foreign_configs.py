"""The ``quantization_config`` of other programs, as far as a checkpoint of theirs needs one.

Each says which modules are not quantized, by their exact names, since programs decide from it alone
what they expect in a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from quantrecipe.schema.quantization_config import ConfiguredModule
from quantrecipe.schema.schemes import Int8Group, ScaledWeight

_SDNQ: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "add_skip_keys": False,
        "dequantize_fp32": True,
        "minimum_allowed_channel_size": 0,
        "minimum_allowed_numel": 0,
        "quant_conv": False,
        "quant_embedding": False,
        "quant_method": "sdnq",
        "sdnq_version": "0.2.8",
        "use_dynamic_quantization": False,
        "use_hadamard": False,
        "use_quantized_matmul": False,
        "use_svd": False,
        "weights_dtype": "int8",
    }
)
"""What SDNQ 0.2.8 writes of what it reads again, and its own rules of what to leave out switched
off."""


def bitsandbytes_config(modules: Iterable[ConfiguredModule]) -> dict[str, Any] | None:
    """For bitsandbytes, as transformers and diffusers write it; ``None`` if all is plain.

    One program, one config: of NF4 and LLM.int8() in the same part it says NF4, and a reader that
    goes by it alone does not find the others.
    """
    kept = tuple(modules)
    stored = [module.weight for module in kept if isinstance(module.weight, ScaledWeight)]
    if not stored:
        return None
    nf4 = any(weight.format == "nf4" for weight in stored)
    return {
        "_load_in_4bit": nf4,
        "_load_in_8bit": not nf4,
        "bnb_4bit_compute_dtype": "bfloat16" if nf4 else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if nf4 else "fp4",
        "bnb_4bit_use_double_quant": any(weight.has_two_levels for weight in stored),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": _plain(kept) or None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": nf4,
        "load_in_8bit": not nf4,
        "quant_method": "bitsandbytes",
    }


def torchao_config(modules: Iterable[ConfiguredModule]) -> dict[str, Any] | None:
    """For torchao 0.18, as transformers writes it; ``None`` if all is plain."""
    kept = tuple(modules)
    first = next((module for module in kept if isinstance(module.weight, ScaledWeight)), None)
    if first is None:
        return None
    rows = {"_data": {"dim": -1}, "_type": "PerRow", "_version": 1}
    data: dict[str, Any] = {"granularity": rows, "set_inductor_config": True}
    if first.weight.format == "float8_e4m3fn":
        name, version = "Float8WeightOnlyConfig", 2
        data = {"set_inductor_config": True, "weight_dtype": _dtype("float8_e4m3fn")}
    elif first.activation is None:
        name, version = "Int8WeightOnlyConfig", 2
        data["group_size"] = None
    else:
        name, version = "Int8DynamicActivationInt8WeightConfig", 2
        data |= {
            "act_mapping_type": {"_data": "SYMMETRIC", "_type": "MappingType"},
            "reduce_range": False,
            "weight_only_decode": False,
        }
    return {
        "include_input_output_embeddings": False,
        "modules_to_not_convert": _plain(kept) or None,
        "quant_method": "torchao",
        "quant_type": {"default": {"_data": data, "_type": name, "_version": version}},
        "untie_embedding_weights": False,
    }


def sdnq_config(modules: Iterable[ConfiguredModule]) -> dict[str, Any] | None:
    """For SDNQ 0.2.8; ``None`` if all is plain."""
    kept = tuple(modules)
    stored = [module.weight for module in kept if isinstance(module.weight, ScaledWeight)]
    if not stored:
        return None
    sizes = {weight.group_size for weight in stored if isinstance(weight, Int8Group)}
    return {
        **_SDNQ,
        "group_size": sizes.pop() if len(sizes) == 1 else -1,
        "modules_to_not_convert": _plain(kept),
    }


def int8_config(modules: Iterable[ConfiguredModule]) -> dict[str, Any] | None:
    """For vllm-omni and LightX2V; ``None`` if all is plain."""
    kept = tuple(modules)
    if not any(isinstance(module.weight, ScaledWeight) for module in kept):
        return None
    return {
        "quant_method": "int8",
        "activation_scheme": "dynamic",
        "ignored_layers": _plain(kept),
    }


def _plain(modules: Iterable[ConfiguredModule]) -> list[str]:
    return sorted(each.name for each in modules if not isinstance(each.weight, ScaledWeight))


def _dtype(name: str) -> dict[str, str]:
    return {"_data": name, "_type": "torch.dtype"}
