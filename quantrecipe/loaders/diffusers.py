"""Converted checkpoints for diffusers: importing this is all that ``from_pretrained`` needs.

The library builds the model without weights, quantized linears take the places of those that
``config.json`` names, and the library's own loader fills them. ``save_pretrained`` writes the same
tensors and the same ``quantization_config``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

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
from quantrecipe.schema.quantization_config import configured_modules
from quantrecipe.schema.tensors import TensorInfo

__all__ = ["QuantRecipeConfig", "QuantRecipeDiffusersQuantizer", "set_kernel"]


class QuantRecipeConfig(StoredConfig, QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a converted checkpoint.

    ``from_pretrained(path, quantization_config=QuantRecipeConfig())`` refuses a checkpoint that has
    none; otherwise there is no need to pass it.
    """


class QuantRecipeDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Puts quantized linears into a model before diffusers loads its weights."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: QuantRecipeConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._configured = configured_modules(quantization_config.required(self.pre_quantized))
        self._modules: dict[str, QuantizedLinear] = {}
        self._stored: dict[str, TensorInfo] = {}

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what would lose a dtype or cannot be done.

        Raises:
            ImportError: accelerate is not installed.
            InvalidInput: a part of the model would stay on the disk.
        """
        if find_spec("accelerate") is None:
            raise ImportError("Loading a quantized model needs accelerate: pip install accelerate")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            message = "diffusers casts what it leaves on the disk, scales and factors among it"
            raise InvalidInput(Problem("no-device", f"device_map: {message}", hint="Use cpu."))

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: Iterable[str | Path]
    ) -> list[str]:
        files = [Path(file) for file in checkpoint_files if str(file).endswith(".safetensors")]
        self._stored = {info.name: info for info in stored_tensors(files)}
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._modules = replace_linears(model, self._configured)
        if self._stored:
            hold_to_headers(self._modules, self._stored)
        model.config.quantization_config = self.quantization_config

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        return is_stored(self._modules, param_name)

    def create_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: Mapping[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Take a tensor as it is stored: ``param_value`` may have been cast on the way."""
        name, _, role = param_name.rpartition(".")
        tensor = state_dict[param_name].to(target_device)
        self._modules[name]._parameters[role] = nn.Parameter(tensor, requires_grad=False)

    def get_special_dtypes_update(self, model: Any, torch_dtype: torch.dtype) -> dict[str, Any]:
        return {
            name: parameter.dtype
            for name, parameter in model.named_parameters()
            if is_stored(self._modules, name)
        }

    def get_cuda_warm_up_factor(self) -> int:
        return 2

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        settle(model, self._modules.values())
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


AUTO_QUANTIZER_MAPPING[QuantMethod.QUANTRECIPE.value] = QuantRecipeDiffusersQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.QUANTRECIPE.value] = QuantRecipeConfig
