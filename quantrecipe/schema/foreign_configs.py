"""The ``quantization_config`` of other programs, as far as a checkpoint of theirs needs one.

Each says which modules are not quantized, since programs decide from it alone what they expect in a
file. Their entries are patterns, and each program reads them in its own way; what is written here
takes the plain modules and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from quantrecipe.schema.quantization_config import ConfiguredModule
from quantrecipe.schema.schemes import AnyWeight, Int8Group, ScaledWeight

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

_BY_ROW: Final = -1
"""What SDNQ says for no groups."""

_HEAD: Final = "lm_head"


def bitsandbytes_config(modules: Iterable[ConfiguredModule]) -> dict[str, Any] | None:
    """For bitsandbytes, as transformers and diffusers write it; ``None`` if all is plain.

    It says one of NF4 and LLM.int8(), so a part that has both is refused before.
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
        "llm_int8_skip_modules": _left_out(kept),
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
        data["weight_dtype"] = _dtype("float8_e4m3fn")
    elif first.weight.format == "nvfp4":
        name, version = "NVFP4WeightOnlyConfig", 1
        data = {"use_dynamic_per_tensor_scale": True}
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
        "modules_to_not_convert": _left_out(kept),
        "quant_method": "torchao",
        "quant_type": {"default": {"_data": data, "_type": name, "_version": version}},
        "untie_embedding_weights": False,
    }


def sdnq_config(modules: Iterable[ConfiguredModule]) -> dict[str, Any] | None:
    """For SDNQ 0.2.8; ``None`` if all is plain."""
    kept = tuple(modules)
    stored = [module for module in kept if isinstance(module.weight, ScaledWeight)]
    if not stored:
        return None
    sizes = {module.name: _group(module.weight) for module in stored}
    # What is said of all is said of weights that have no room for several groups as well.
    common = _group(stored[0].weight) if len(set(sizes.values())) == 1 else _BY_ROW
    return {
        **_SDNQ,
        "group_size": common,
        "modules_quant_config": {
            f"{name}.weight": {"group_size": size}
            for name, size in sorted(sizes.items())
            if size != common
        },
        # Whole names of weights are read as such; a name without a dot takes all that have it as
        # one of their segments.
        "modules_to_not_convert": [f"{name}.weight" for name in _plain(kept)] + _tied(kept),
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


def mixed_bitsandbytes(formats: Iterable[str]) -> tuple[str, str] | None:
    """Why one part cannot hold weights in these formats, and what would work; ``None`` if it can.

    Args:
        formats: of the quantized weights of a part.
    """
    if not {"nf4", "llm_int8"} <= set(formats):
        return None
    return (
        "for bitsandbytes, a config.json says one of the two of the whole part",
        "Give all of its modules the same format.",
    )


def _plain(modules: Iterable[ConfiguredModule]) -> list[str]:
    return sorted(each.name for each in modules if not isinstance(each.weight, ScaledWeight))


def _left_out(modules: Sequence[ConfiguredModule]) -> list[str]:
    """Patterns for transformers and diffusers that take the plain modules.

    transformers leaves out what begins with a pattern, a regular expression, or ends in it, letter
    by letter; diffusers what has it before a dot. So a plain ``proj_out`` would take a quantized
    ``blocks.0.proj_out`` along: then ``^proj_out`` is written, which in transformers takes the one
    alone. diffusers has no way to say that, finds a plain weight where it wants a quantized one,
    and refuses the file.
    """
    quantized = "".join(
        f"{each.name}\n" for each in modules if isinstance(each.weight, ScaledWeight)
    )
    names = _plain(modules)
    clash = {name for name in names if f"{name}\n" in quantized or f"{name}." in quantized}
    return [f"^{name}" if name in clash else name for name in names] + _tied(modules)


def _tied(modules: Iterable[ConfiguredModule]) -> list[str]:
    """The head of a language model that is in no file, because it shares the embedding's weight.

    Readers replace every linear layer of a model that they are not told to leave alone, whether or
    not the file has it.
    """
    return [] if any(_HEAD in each.name.split(".") for each in modules) else [_HEAD]


def _group(weight: AnyWeight) -> int:
    return weight.group_size if isinstance(weight, Int8Group) else _BY_ROW


def _dtype(name: str) -> dict[str, str]:
    return {"_data": name, "_type": "torch.dtype"}
