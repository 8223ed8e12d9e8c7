"""Converted checkpoints for transformers: importing this is all that ``from_pretrained`` needs.

The library builds the model without weights, quantized linears take the places of those that
``config.json`` names, and the library's own loader fills them. ``save_pretrained`` writes the same
tensors and the same ``quantization_config``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantrecipe.loaders.linear import QuantizedLinear
from quantrecipe.loaders.replacing import (
    QuantMethod,
    StoredConfig,
    hold_to_headers,
    is_stored,
    replace_linears,
    set_kernel,
    settle,
    stored_tensors,
)
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.quantization_config import (
    CONFIG_NAME,
    ConfiguredModule,
    QuantizationConfig,
    configured_modules,
    parse_quantization_config,
    quantization_config,
)
from quantrecipe.schema.tensors import TensorInfo

__all__ = ["QuantRecipeConfig", "QuantRecipeHfQuantizer", "set_kernel"]


@register_quantization_config(QuantMethod.QUANTRECIPE.value)
class QuantRecipeConfig(StoredConfig, QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a converted checkpoint.

    ``from_pretrained(path, quantization_config=QuantRecipeConfig())`` refuses a checkpoint that has
    none; otherwise there is no need to pass it.
    """


@register_quantizer(QuantMethod.QUANTRECIPE.value)
class QuantRecipeHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts quantized linears into a model before transformers loads its weights."""

    quantization_config: QuantRecipeConfig

    def __init__(self, quantization_config: QuantRecipeConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._configured = configured_modules(quantization_config.required(self.pre_quantized))
        self._modules: dict[str, QuantizedLinear] = {}
        self._stored_as: dict[str, ConfiguredModule] = {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> Any:
        to_model = _renaming(model)
        names = {
            name: to_model(f"{name}.weight").removesuffix(".weight") for name in self._configured
        }
        left_out = _left_out(model, names)
        self._stored_as = {
            names[name]: module for name, module in self._configured.items() if name not in left_out
        }
        self._modules = replace_linears(model, self._stored_as)
        for module in self._modules.values():
            # What stays on the disk is still empty when transformers fills in what is missing.
            cast(Any, module)._is_hf_initialized = True
        files = [Path(file) for file in checkpoint_files or () if file.endswith(".safetensors")]
        if files:
            to_model = _renaming(model)  # of scales and factors, too
            stored = {to_model(info.name): info for info in stored_tensors(files)}
            _refuse_tied_apart(model, self._modules, stored)
            hold_to_headers(self._modules, stored)
        return model

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        if is_stored(self._modules, converter.target_patterns[0]):
            return None
        new: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        settle(model, self._modules.values())
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        # Before the configuration is written: modules as the file will name them.
        self.quantization_config.stored = self._saved(model)
        return None, {}

    def _saved(self, model: Any) -> QuantizationConfig:
        renamed = []
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear) and name in self._stored_as:
                (key,) = revert_weight_conversion(model, {f"{name}.weight": module.weight})
                stored = self._stored_as[name]
                renamed.append(
                    ConfiguredModule(
                        key.removesuffix(".weight"),
                        stored.scheme,
                        stored.weight,
                        stored.activation,
                        stored.smoothed,
                        stored.rotation,
                    )
                )
        return parse_quantization_config(quantization_config(renamed))

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _renaming(model: Any) -> Callable[[str], str]:
    """What transformers calls a tensor of the checkpoint in this model."""
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    state = model.state_dict()

    def rename(name: str) -> str:
        found: str = rename_source_key(name, renamings, [], model.base_model_prefix, state)[0]
        return found

    return rename


def _left_out(model: Any, names: Mapping[str, str]) -> set[str]:
    """Modules that transformers leaves out: heads of a base model, and what its class ignores."""
    held = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    is_base = any(name == prefix + new and new in held for name, new in names.items())
    ignored = [re.compile(each) for each in model._keys_to_ignore_on_load_unexpected or ()]
    return {
        name
        for name, new in names.items()
        if new not in held
        and (
            (is_base and not name.startswith(prefix))
            or any(pattern.search(f"{new}.weight") for pattern in ignored)
        )
    }


def _refuse_tied_apart(
    model: Any, modules: Mapping[str, QuantizedLinear], stored: Mapping[str, TensorInfo]
) -> None:
    """A quantized weight cannot stand for another module's, which would be given its codes."""
    pairs = {
        *model.all_tied_weights_keys.items(),
        *((source, target) for target, source in model.all_tied_weights_keys.items()),
    }
    problems = [
        Problem(
            "tied-weight",
            f"the model ties it to {other!r}, which the checkpoint does not have",
            "Protect the module in the recipe, and convert again.",
            file=CONFIG_NAME,
            tensor=name,
        )
        for name, other in sorted(pairs)
        if name.removesuffix(".weight") in modules and other not in stored
    ]
    if problems:
        raise InvalidInput(problems)
