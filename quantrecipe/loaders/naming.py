"""What a module calls the tensors that a checkpoint has for it, and how it computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from quantrecipe.loaders.checkpoint import Checkpoint
from quantrecipe.schema.layout import Layout, ModuleTensors, TensorTemplate
from quantrecipe.schema.layout_reading import StoredModule, fill_template, roles
from quantrecipe.schema.provenance import schemes_of
from quantrecipe.schema.schemes import DynamicActivation, PlainWeight

_BEFORE: Final = "{module}."


def local_names(layout: Layout, part: str, module: StoredModule) -> dict[str, str]:
    """Role to what follows the module's name in the name of its tensor on the disk.

    A template that puts nothing after the module's name gives the role's own name.
    """
    templates: ModuleTensors = getattr(layout.modules, _field(module))
    candidates = dict([("weight", templates.weight), *roles(templates)])
    return {
        role: _after(_read_by(candidates[role], part, module.name, info.name)) or role
        for role, info in module.tensors.items()
    }


def plain_names(layout: Layout, module: StoredModule) -> dict[str, str]:
    """Role to the name that a plain module's tensor has in a model of layout ``layout``."""
    templates = layout.modules.plain
    candidates = dict([("weight", templates.weight), *roles(templates)])
    return {
        role: (_after(candidates[role].name) if role in candidates else None) or role
        for role in module.tensors
    }


def activations(checkpoint: Checkpoint, part: str) -> Mapping[str, DynamicActivation | None]:
    """How activations are quantized before each quantized module of a part.

    The lock says it; else the rules of the recipe do. What neither speaks of is weight-only.
    """
    modules = checkpoint.parts[part].modules
    if checkpoint.lock is not None:
        locked = {name: checkpoint.locked(name, part) for name in modules}
        return {name: each.activation for name, each in locked.items() if each is not None}
    if checkpoint.recipe is None:
        return {}
    opened = {name: each.modules for name, each in checkpoint.parts.items()}
    schemes = schemes_of(checkpoint.recipe, opened)
    return {name: each.activation for (owner, name), each in schemes.items() if owner == part}


def _field(module: StoredModule) -> str:
    return "plain" if isinstance(module.weight, PlainWeight) else module.weight.format


def _read_by(template: TensorTemplate, part: str, module: str, tensor: str) -> str:
    for each in (template.name, *template.aliases):
        if fill_template(each, part, "module", module) == tensor:
            return each
    raise AssertionError(f"{tensor!r} is not read by {template.name!r}")


def _after(template: str) -> str | None:
    _, found, suffix = template.partition(_BEFORE)
    return suffix if found and "." not in suffix and suffix else None
