"""Quantized linears in a model that has no weights yet, as a ``quantization_config`` names them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, cast

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from quantrecipe.checkpoint.header import read_header
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.loaders.kernels import AUTO, find_kernel
from quantrecipe.loaders.linear import ROLES, QuantizedLinear
from quantrecipe.schema.problems import InvalidInput, Problem, closest
from quantrecipe.schema.quantization_config import (
    CONFIG_NAME,
    ConfiguredModule,
    QuantizationConfig,
    parse_quantization_config,
)
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.tensors import TensorInfo

STORED: Final = tuple(role for role in ROLES if role != "bias")
"""What is never cast: codes, scales, zero points and factors."""

_COMPARED: Final = 50
PARAMETRIZED: Final = "Take the parametrization off first (torch.nn.utils.parametrize)."
_PROTECT: Final = "Protect the module in the recipe, and convert again."


class QuantMethod(StrEnum):
    """The ``quant_method`` of a ``quantization_config``, as libraries of models ask for it."""

    QUANTRECIPE = "quantrecipe"


class StoredConfig:
    """What the ``quantization_config`` of a converted checkpoint says; there is nothing to choose.

    Args:
        fields: those of the object; none: whatever the checkpoint says, which has to be ours.

    Attributes:
        stored: the object, ``None`` if there are no fields.

    Raises:
        InvalidInput: with everything that is wrong with the fields.
    """

    def __init__(self, **fields: Any) -> None:
        self.quant_method = QuantMethod.QUANTRECIPE
        self.stored: QuantizationConfig | None = (
            parse_quantization_config(fields) if fields else None
        )

    def to_dict(self) -> dict[str, Any]:
        """The object as JSON values."""
        if self.stored is None:
            return {"quant_method": self.quant_method.value}
        found: dict[str, Any] = self.stored.model_dump(
            mode="json", by_alias=True, exclude_none=True
        )
        return found

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: nothing in it is a default that could be left out."""
        return self.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def required(self, pre_quantized: bool) -> QuantizationConfig:
        """The object.

        Raises:
            InvalidInput: the checkpoint has none.
        """
        if self.stored is None or not pre_quantized:
            raise InvalidInput(
                Problem(
                    "not-converted",
                    "there is no quantization_config in it",
                    "Convert the checkpoint with the layout 'quantrecipe' (nothing is quantized "
                    "while loading), or load it without quantization_config=.",
                    file=CONFIG_NAME,
                )
            )
        return self.stored


def replace_linears(
    model: nn.Module, modules: Mapping[str, ConfiguredModule], *, kernel: str = AUTO
) -> dict[str, QuantizedLinear]:
    """Put an uninitialized quantized linear in the place of each linear that is named.

    It is on the device of the linear's weight, and its bias has the dtype of the linear's. A linear
    that is shared is replaced wherever it is.

    Args:
        model: what holds the linears.
        modules: dotted names in the model to how they are stored.
        kernel: a kernel's name, or ``auto``.

    Returns:
        the new modules by the names.

    Raises:
        InvalidInput: with every name that is no linear of the model; the model is as it was.
    """
    held = dict(model.named_modules(remove_duplicate=False))
    linears = [name for name, module in held.items() if isinstance(module, nn.Linear)]
    problems: list[Problem] = []
    made: dict[int, QuantizedLinear] = {}
    for name, stored in modules.items():
        module = held.get(name)
        if module is None:
            near = closest(name, linears) if len(problems) < _COMPARED else None
            hint = f"Did you mean {near!r}?" if near else None
            message = "the model has no module of this name"
            problems.append(Problem("unknown-module", message, hint, CONFIG_NAME, tensor=name))
        elif (refusal := not_replaceable(module, name)) is not None:
            problems.append(Problem(*refusal, file=CONFIG_NAME, tensor=name))
        elif id(module) not in made:
            made[id(module)] = _quantized(cast(nn.Linear, module), stored, kernel)
    if problems:
        raise InvalidInput(problems)
    for owner in held.values():
        for attribute, child in owner._modules.items():
            if child is not None and id(child) in made:
                owner._modules[attribute] = made[id(child)]
    return {name: made[id(held[name])] for name in modules}


def _quantized(linear: nn.Linear, stored: ConfiguredModule, kernel: str) -> QuantizedLinear:
    assert isinstance(stored.weight, ScaledWeight)
    bias = linear._parameters["bias"]
    made = QuantizedLinear(
        linear.in_features,
        linear.out_features,
        stored.weight,
        stored.activation,
        smoothing=stored.smoothed,
        rotation=stored.rotation,
        bias=bias is not None,
        shapes={"weight_scale": ()} if stored.weight.granularity == "tensor" else None,
        kernel=kernel,
        device=linear.weight.device,
        dtype=None if bias is None else bias.dtype,
    )
    return made.train(linear.training)


def not_replaceable(module: nn.Module, name: str) -> tuple[str, str, str] | None:
    """Why no quantized linear can take the place of a module: kind, message and hint, or ``None``.

    Args:
        module: what the model has there.
        name: what the message calls it.
    """
    kind = type(module).__name__
    if is_parametrized(module):
        return "parametrized", f"the model computes the weight of {name!r}", PARAMETRIZED
    if not isinstance(module, nn.Linear):
        message = f"the model's {name!r} is a {kind}; only nn.Linear has a quantized form"
        return "not-a-linear", message, _PROTECT
    if isinstance(module, NonDynamicallyQuantizableLinear):
        message = f"the model's {name!r} is part of an nn.MultiheadAttention, which uses its weight"
        return "not-a-linear", message, _PROTECT
    if type(module).forward is not nn.Linear.forward or "forward" in module.__dict__:
        message = f"the model's {name!r} is a {kind} with a forward of its own, which would be lost"
        return "not-a-linear", message, "Load first, and change its forward then."
    if module._parameters.get("weight") is None:
        return "parametrized", f"the model computes the weight of {name!r}", PARAMETRIZED
    return None


def hold_to_headers(
    modules: Mapping[str, QuantizedLinear], stored: Mapping[str, TensorInfo]
) -> None:
    """Compare quantized modules with the headers of what will be loaded into them.

    Args:
        modules: by their names.
        stored: headers of the checkpoint's tensors, by the names that the model gives them.

    Raises:
        InvalidInput: with every tensor of them that is missing, is not asked for, or has another
            dtype or shape.
    """
    problems = list(_differences(modules, stored))
    if problems:
        raise InvalidInput(problems)


def _differences(
    modules: Mapping[str, QuantizedLinear], stored: Mapping[str, TensorInfo]
) -> Iterator[Problem]:
    for name, module in modules.items():
        for role in (*STORED, "bias"):
            key = f"{name}.{role}"
            wanted, info = module._parameters[role], stored.get(key)
            if wanted is None or info is None:
                if wanted is not None:
                    message = "is not in the checkpoint"
                    yield Problem("missing-tensor", message, tensor=key)
                elif info is not None:
                    message = f"is in the checkpoint, but the model has no {role} there"
                    yield Problem("unexpected-tensor", message, file=str(info.file), tensor=key)
                continue
            if tuple(wanted.shape) != info.shape:
                message = f"is {list(info.shape)}, expected {list(wanted.shape)}"
                yield Problem("misshaped-tensor", message, file=str(info.file), tensor=key)
            if role in STORED and TORCH_DTYPES.get(info.dtype) != wanted.dtype:
                message = f"is {info.dtype}, expected {str(wanted.dtype).removeprefix('torch.')}"
                yield Problem("mistyped-tensor", message, file=str(info.file), tensor=key)


def is_stored(modules: Collection[str], tensor: str) -> bool:
    """Whether a dotted name is that of codes, scales, zero points or factors of a module."""
    module, _, role = tensor.rpartition(".")
    return role in STORED and module in modules


def stored_tensors(files: Iterable[Path]) -> Iterator[TensorInfo]:
    """The headers of every tensor in safetensors files."""
    for file in files:
        yield from read_header(file).tensors.values()


def settle(model: nn.Module, modules: Collection[QuantizedLinear]) -> None:
    """What is left to do with quantized modules once a library has loaded their tensors.

    Codes, scales and factors are taken out of what is trained. Where ``model.dtype`` is taken from
    one of them, that is a warning.
    """
    _freeze(modules)
    problem = _misleading_dtype(model, modules)
    if problem is not None:
        warnings.warn(problem, stacklevel=3)


def _freeze(modules: Iterable[QuantizedLinear]) -> None:
    """Take codes, scales and factors out of what is trained."""
    for module in modules:
        for role in STORED:
            parameter = module._parameters[role]
            if parameter is not None:
                parameter.requires_grad_(False)


def _misleading_dtype(model: nn.Module, modules: Iterable[QuantizedLinear]) -> str | None:
    """What ``model.dtype`` is taken from, if that is a scale or a code: a sentence, or ``None``."""
    ours = {id(each) for module in modules for each in module.parameters(recurse=False)}
    biases = {id(module.bias) for module in modules}
    first = next(((n, p) for n, p in model.named_parameters() if p.is_floating_point()), None)
    if first is None or id(first[1]) not in ours - biases:
        return None
    return (
        f"the first floating parameter of the model is {first[0]!r}, so model.dtype is "
        f"{first[1].dtype}, and what is computed from it may be wrong: protect the module in the "
        "recipe, and convert again"
    )


def set_kernel(model: nn.Module, kernel: str) -> int:
    """Let every quantized linear of a model compute with one kernel.

    Args:
        model: loaded or not.
        kernel: a kernel's name, or ``auto``: the fastest that fits, call by call.

    Returns:
        how many there are.

    Raises:
        InvalidInput: there is no such kernel.
    """
    if kernel != AUTO:
        find_kernel(kernel)
    found = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for module in found:
        module.kernel = kernel
    return len(found)
