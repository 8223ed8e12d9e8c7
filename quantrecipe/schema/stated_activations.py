"""How activations are quantized before each module, as far as a checkpoint says it.

No tensor shows it: the recipe that a checkpoint was made by says it, its metadata, or the
``quantization_config`` of the ``config.json`` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.patterns import Patterns, check_pattern
from quantrecipe.schema.provenance import schemes_of
from quantrecipe.schema.quantization_config import configured_modules, parse_quantization_config
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.schemes import DynamicActivation, ScaledWeight
from quantrecipe.schema.tensors import SourcePart

Activations = Mapping[str, DynamicActivation]
"""By the module's name inside its part; what is not there has plain activations."""

_PER_TOKEN: Final = DynamicActivation(
    format="int8", granularity="token", dynamic=True, symmetric=True
)
_PER_TENSOR: Final = _PER_TOKEN.model_copy(update={"granularity": "tensor"})
_CLASS: Final = "Linear"


def stated_by_recipe(
    recipe: Recipe, modules: Mapping[str, Mapping[str, StoredModule]]
) -> dict[str, dict[str, DynamicActivation]]:
    """What the recipe that a checkpoint was made by says, by part.

    Args:
        recipe: the recipe.
        modules: of every part of the checkpoint, by name.
    """
    found: dict[str, dict[str, DynamicActivation]] = {part: {} for part in modules}
    for (part, name), scheme in schemes_of(recipe, modules).items():
        if scheme.activation is not None:
            found[part][name] = scheme.activation
    return found


def stated_beside(
    layout: Layout,
    part: SourcePart,
    modules: Mapping[str, StoredModule],
    quantization: Mapping[str, Any] | None,
) -> tuple[dict[str, DynamicActivation], list[str]]:
    """What the metadata of a part say, or the ``config.json`` beside it.

    Args:
        layout: that the part is in.
        part: its files.
        modules: its modules.
        quantization: ``quantization_config`` of the ``config.json``; ``None``: there is none.

    Returns:
        The activations, and notes about what is said and no recipe can say.

    Raises:
        InvalidInput: a ``quantization_config`` of quantrecipe is broken.
    """
    stored = [name for name, each in modules.items() if isinstance(each.weight, ScaledWeight)]
    if layout.module_metadata == "torchao":
        return dict(_torchao(part, stored)), []
    said = quantization or {}
    method = said.get("quant_method")
    if method == "quantrecipe":
        configured = configured_modules(parse_quantization_config(said))
        named = {name: configured[name].activation for name in stored if name in configured}
        return {name: each for name, each in named.items() if each is not None}, []
    if method == "int8" and said.get("activation_scheme") == "dynamic":
        return dict.fromkeys(stored, _PER_TOKEN), []
    if method == "compressed-tensors":
        return _compressed_tensors(said, stored)
    return {}, []


def _torchao(part: SourcePart, names: list[str]) -> Iterator[tuple[str, DynamicActivation]]:
    """Of the classes of weights in the metadata (torchao 0.18): what int8 activations they ask."""
    metadata = {key: value for file in part.files for key, value in file.metadata.items()}
    for name in names:
        try:
            said = json.loads(metadata.get(f"{name}.weight", "null"))
            kwargs = said["_data"]["act_quant_kwargs"]
            if kwargs["_type"] == "QuantizeTensorToInt8Kwargs":
                by_row = kwargs["_data"]["granularity"]["_type"] == "PerRow"
                yield name, _PER_TOKEN if by_row else _PER_TENSOR
        except (ValueError, KeyError, TypeError, RecursionError):
            continue


def _compressed_tensors(
    said: Mapping[str, Any], names: list[str]
) -> tuple[dict[str, DynamicActivation], list[str]]:
    groups = said.get("config_groups")
    found: dict[str, DynamicActivation] = {}
    notes: dict[str, None] = {}
    for name in names:
        group = _group_of(groups.values() if isinstance(groups, dict) else (), name)
        inputs = group.get("input_activations")
        if not isinstance(inputs, dict):
            continue
        activation = _dynamic(inputs)
        if activation is None:
            notes[
                "its config.json has activations quantized in a way that no recipe says "
                f"({_described(inputs)}): they are left plain"
            ] = None
        else:
            found[name] = activation
    return found, list(notes)


def _group_of(groups: Any, name: str) -> Mapping[str, Any]:
    """The config group of a module: by its name, an expression, or the class of all linears."""
    ranked: list[tuple[int, Mapping[str, Any]]] = []
    for group in groups:
        targets = group.get("targets") if isinstance(group, dict) else None
        for target in targets if isinstance(targets, list) else ():
            if target == name:
                ranked.append((0, group))
            elif isinstance(target, str) and target.startswith("re:"):
                # Theirs matches the beginning of a name, a pattern here all of it.
                pattern = f"re:(?:{target[3:]}).*"
                known = check_pattern(pattern) is None
                if known and Patterns.compile([pattern]).matches(name) is not None:
                    ranked.append((1, group))
            elif target == _CLASS:
                ranked.append((2, group))
    return min(ranked, key=lambda pair: pair[0], default=(0, {}))[1]


def _dynamic(inputs: Mapping[str, Any]) -> DynamicActivation | None:
    """What is asked of activations, if a recipe can say it."""
    wanted = {"num_bits": 8, "dynamic": True, "symmetric": True}
    known = {"int": "int8", "float": "float8_e4m3fn"}.get(str(inputs.get("type")))
    simple = all(inputs.get(key, True) == value for key, value in wanted.items())
    if known is None or not simple or inputs.get("strategy") not in ("token", "tensor"):
        return None
    return DynamicActivation.model_validate(
        {"format": known, "granularity": inputs["strategy"], "dynamic": True}
    )


def _described(inputs: Mapping[str, Any]) -> str:
    how = "dynamic" if inputs.get("dynamic") else "static"
    return f"{how}, {inputs.get('num_bits')} bits by {inputs.get('strategy')}"
