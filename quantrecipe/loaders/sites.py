"""A model as a checkpoint sees it: modules and tensors by dotted name, wrappers looked through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from quantrecipe.schema.problems import Problem

_SEEN_THROUGH: Final = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "base_layer"})
"""What wrappers (``torch.compile``, activation checkpoints, adapters) call the module inside."""

_ADAPTED: Final = "base_layer"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module holds a tensor.

    Attributes:
        module: the module.
        attribute: what it calls the tensor.
        name: the tensor's dotted name.
        buffer: whether it is a buffer.
    """

    module: nn.Module
    attribute: str
    name: str
    buffer: bool


@dataclass(slots=True)
class Held:
    """A tensor of a model, in every place that holds it: several where weights are tied.

    Attributes:
        tensor: what is held now.
        places: by the order in which they were found.
        stored: whether a checkpoint has it: not where a buffer is not persistent, and not where it
            is an adapter's.
    """

    tensor: Tensor
    places: list[Place] = field(default_factory=list)
    stored: bool = False


@dataclass(slots=True)
class Site:
    """A module of a model, under every name that it has.

    Attributes:
        module: the module.
        names: dotted, without what wrappers add; several where a module is shared.
        owners: the modules that hold it, each with its name for it.
    """

    module: nn.Module
    names: list[str] = field(default_factory=list)
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)


class Model:
    """The modules and tensors of a model.

    Attributes:
        sites: every module once.
        tensors: every tensor once.
        problems: wrappers whose inside cannot be replaced.
    """

    def __init__(self, root: nn.Module) -> None:
        self.problems: list[Problem] = []
        sites: dict[int, Site] = {}
        tensors: dict[int, Held] = {}
        for name, module, owner, adapter in self._walk(root, "", None, False):
            site = sites.setdefault(id(module), Site(module))
            if name not in site.names:
                site.names.append(name)
            if owner is not None and owner not in site.owners:
                site.owners.append(owner)
            for place, tensor, persistent in _tensors(name, module):
                if is_lazy(tensor):
                    self.problems.append(_lazy(place.name))
                    continue
                held = tensors.setdefault(id(tensor), Held(tensor))
                held.places.append(place)
                held.stored |= persistent and not adapter
        self.sites = list(sites.values())
        self.tensors = list(tensors.values())
        self.by_name = {name: site for site in self.sites for name in site.names}
        self.held = {place.name: held for held in self.tensors for place in held.places}

    def _walk(
        self, module: nn.Module, name: str, owner: tuple[nn.Module, str] | None, adapter: bool
    ) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, str] | None, bool]]:
        problem = _closed(module, name)
        if problem is not None:
            self.problems.append(problem)
            return
        # What lies beside the module that it adapts is an adapter's own.
        adapts = _ADAPTED in module._modules
        yield name, module, owner, adapter or adapts
        for attribute, child in module._modules.items():
            if child is not None:
                through = _is_wrapper(module, attribute)
                inside = name if through else dotted(name, attribute)
                own = adapter if attribute == _ADAPTED else adapter or adapts
                yield from self._walk(child, inside, (module, attribute), own)


def dotted(*names: str) -> str:
    """Names with dots between them, without the empty ones."""
    return ".".join(name for name in names if name)


def _tensors(name: str, module: nn.Module) -> Iterator[tuple[Place, Tensor, bool]]:
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield Place(module, attribute, dotted(name, attribute), False), parameter, True
    for attribute, buffer in module._buffers.items():
        if buffer is not None:
            persistent = attribute not in module._non_persistent_buffers_set
            yield Place(module, attribute, dotted(name, attribute), True), buffer, persistent


def _is_wrapper(module: nn.Module, attribute: str) -> bool:
    if attribute in _SEEN_THROUGH:
        return True
    if isinstance(module, nn.DataParallel):
        return attribute == "module"
    is_adapter = type(module).__module__.partition(".")[0] == "peft"
    return is_adapter and attribute in ("base_model", "model")


def _closed(module: nn.Module, name: str) -> Problem | None:
    """Why nothing inside a wrapper can be replaced, if it is one that keeps hold of it."""
    kind = type(module).__name__
    if isinstance(module, nn.parallel.DistributedDataParallel) or kind in (
        "FullyShardedDataParallel",
        "ScriptModule",
        "RecursiveScriptModule",
    ):
        return Problem(
            "closed-wrapper",
            f"{name or 'the model'} is a {kind}, which keeps hold of the tensors inside",
            hint="Load into the model first, then wrap it.",
            tensor=name or None,
        )
    return None


def _lazy(name: str) -> Problem:
    return Problem(
        "lazy-parameter",
        "has no shape before the model's first call",
        hint="Build the model with modules that are told their shapes.",
        tensor=name,
    )
