"""What a loader that is written beside a checkpoint is written for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.lock import Lock, LockedModule, LockedTensor, Role
from quantrecipe.schema.plan import Plan, PlannedModule, PlannedTensor
from quantrecipe.schema.registry import resolve_layout
from quantrecipe.schema.schemes import AnyWeight, DynamicActivation, Hadamard


@dataclass(frozen=True, slots=True)
class Entry:
    """A module of a checkpoint, or a tensor of none, as it is stored.

    Attributes:
        part, name: which.
        tensors: what it consists of, by role.
        files: that those are in.
        nbytes: of all of them.
        weight: how its weight is stored; ``None``: it is no module.
        activation, rotation: what inputs go through before.
    """

    part: str
    name: str
    tensors: Mapping[str, PlannedTensor | LockedTensor]
    files: frozenset[str]
    nbytes: int
    weight: AnyWeight | None = None
    activation: DynamicActivation | None = None
    rotation: Hadamard | None = None


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint that a loader is written for: what will be in it, or what its lock says.

    Attributes:
        recipe: name and digest of the recipe.
        layout: how all of it is laid out.
        parts: their names.
        entries: modules first, in the order of the plan.
    """

    recipe: str
    layout: Layout
    parts: tuple[str, ...]
    entries: tuple[Entry, ...]

    @classmethod
    def of_plan(cls, plan: Plan) -> Contents:
        """What a plan makes."""
        return cls(
            _signature(plan.recipe.name, plan.recipe_sha256),
            plan.target_layout,
            tuple(part.name for part in plan.parts),
            (
                *(_module(module, module.outputs, module.nbytes) for module in plan.modules),
                *(
                    _other(other.part, other.name, other.output, other.output.nbytes)
                    for other in plan.others
                ),
            ),
        )

    @classmethod
    def of_lock(cls, lock: Lock) -> Contents:
        """What was made.

        Raises:
            InvalidInput: its layout is not known here.
        """
        return cls(
            _signature(lock.recipe.name, lock.recipe_sha256),
            resolve_layout(lock.recipe.target.layout),
            tuple(dict.fromkeys(file.part for file in lock.source)),
            (
                *(
                    _module(module, module.tensors, sum(t.bytes for t in module.tensors.values()))
                    for module in lock.modules
                ),
                *(
                    _other(other.part, other.name, other.tensor, other.tensor.bytes)
                    for other in lock.others
                ),
            ),
        )


def _signature(name: str, sha256: str) -> str:
    return f"{name}, sha256:{sha256}"


def _module(
    module: PlannedModule | LockedModule,
    tensors: Mapping[Role, PlannedTensor] | Mapping[Role, LockedTensor],
    nbytes: int,
) -> Entry:
    found: dict[str, PlannedTensor | LockedTensor] = {str(role): t for role, t in tensors.items()}
    return Entry(
        part=module.part,
        name=module.name,
        tensors=found,
        files=frozenset(tensor.file for tensor in found.values()),
        nbytes=nbytes,
        weight=module.weight,
        activation=module.activation,
        rotation=module.rotation,
    )


def _other(part: str, name: str, tensor: PlannedTensor | LockedTensor, nbytes: int) -> Entry:
    return Entry(part, name, {"tensor": tensor}, frozenset({tensor.file}), nbytes)
