"""Which modules of a model are measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from quantrecipe.schema.patterns import Patterns
from quantrecipe.schema.problems import InvalidInput, Problem, closest, did_you_mean
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import resolve_names
from quantrecipe.schema.renaming import new_names
from quantrecipe.schema.schemes import PlainWeight

_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Everything that multiplies its input with a two-dimensional weight ``[out, in]``, by name.

    A module that has several names goes by the first.
    """
    return {name: module for name, module in model.named_modules() if name and _is_linear(module)}


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(module, _LOOKED_UP):
        return False
    if is_lazy(weight):
        return isinstance(module, nn.Linear)
    if weight.ndim != 2:
        return False
    bias = getattr(module, "bias", None)
    # One that is stored [in, out], as its bias shows, is no module of a checkpoint.
    return not (
        isinstance(bias, Tensor)
        and bias.ndim == 1
        and len(bias) == weight.shape[1] != weight.shape[0]
    )


def channels_of(module: nn.Module) -> int:
    """The input features of a module of ``linears``."""
    features = getattr(module, "in_features", None)
    if isinstance(features, int):
        return features
    assert isinstance(module.weight, Tensor)
    return module.weight.shape[1]


def by_patterns(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of ``linears`` that patterns take.

    Raises:
        InvalidInput: a pattern is none, or takes no module.
    """
    found, compiled = linears(model), Patterns.compile(patterns)
    problems = []
    for text in patterns:
        alone = Patterns.compile([text])
        if not any(alone.matches(name) is not None for name in found):
            near = closest(text, found)
            hint = f"Did you mean {near!r}?" if near else "Only linear modules are measured."
            problems.append(
                Problem("takes-nothing", f"pattern {text!r} takes no module of the model", hint)
            )
    if problems:
        raise InvalidInput(problems)
    return {name: module for name, module in found.items() if compiled.matches(name) is not None}


def by_recipe(model: nn.Module, recipe: Recipe, part: str) -> dict[str, nn.Module]:
    """The modules of ``linears`` that a recipe quantizes or protects in a part.

    The model may call them as the source does, or as ``target.names`` does.

    Raises:
        InvalidInput: the recipe has no such part, or takes no module of this model.
    """
    if part not in recipe.source.parts:
        hint = did_you_mean(part, list(recipe.source.parts))
        raise InvalidInput(Problem("unknown-part", f"the recipe has no part {part!r}", hint))
    renaming, entries = resolve_names(recipe.target.names), list(_entries(recipe, part))
    found = {}
    for name, module in linears(model).items():
        names = (name, *new_names(name, renaming))
        if any(_is_measured(each, entries) for each in names):
            found[name] = module
    if not found:
        raise InvalidInput(
            Problem(
                "takes-nothing",
                f"the recipe {recipe.name!r} quantizes or protects no module of the model as "
                f"part {part!r}",
                hint="Observe the network whose modules are called as in the recipe's rules.",
            )
        )
    return found


def _entries(recipe: Recipe, part: str) -> Iterator[tuple[Patterns, bool]]:
    """Protected entries and rules in the order in which they take modules, and whether to look."""
    for entry in recipe.protected:
        if entry.parts is None or part in entry.parts:
            yield Patterns.compile(entry.modules), True
    for rule in recipe.rules:
        if rule.parts is None or part in rule.parts:
            weight = recipe.schemes[rule.scheme].weight
            yield Patterns.compile(rule.modules), not isinstance(weight, PlainWeight)


def _is_measured(name: str, entries: Sequence[tuple[Patterns, bool]]) -> bool:
    for patterns, measured in entries:
        if patterns.matches(name) is not None:
            return measured
    return False


def weight_maxima(modules: Mapping[str, nn.Module], part: str) -> dict[str, Tensor | None]:
    """The largest absolute weight of each column, float32 ``[in]`` on the CPU.

    ``None`` where a weight is of no plain dtype: what its codes mean, others know.

    Raises:
        InvalidInput: weights are on the meta device or not made yet, or hold a NaN or an infinity;
            a problem for each.
    """
    found: dict[str, Tensor | None] = {}
    problems = []
    for name, module in modules.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        if is_lazy(weight) or weight.device.type == "meta":
            message = f"the weight of {name!r} of part {part!r} has no values"
            hint = "Load the weights, and keep them on a device, before the model is observed."
            problems.append(Problem("no-weight", message, hint, tensor=name))
            continue
        found[name] = None
        if weight.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            low, high = torch.aminmax(weight.detach(), dim=0)
            largest = torch.maximum(-low, high).float().cpu()
            found[name] = largest
            if not bool(largest.isfinite().all()):
                message = f"the weight of {name!r} of part {part!r} holds a NaN or an infinity"
                problems.append(Problem("non-finite-weight", message, tensor=name))
    if problems:
        raise InvalidInput(problems)
    return found
