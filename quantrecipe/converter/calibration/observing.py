"""Hooks that measure what modules are handed, around any run of any model."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantrecipe.converter.calibration.choosing import (
    by_patterns,
    by_recipe,
    channels_of,
    weight_maxima,
)
from quantrecipe.converter.calibration.measurements import (
    Measured,
    MeasuredPart,
    Measurements,
    non_finite_input,
)
from quantrecipe.converter.calibration.siblings import Identities, Siblings
from quantrecipe.converter.calibration.sums import ModuleSums
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recipe import Recipe

Timestep = str | Callable[[tuple[Any, ...], Mapping[str, Any]], Any]
"""The name of an argument of the model's forward, or what finds the timestep in its positional and
keyword arguments."""


@contextmanager
def observe(
    model: nn.Module,
    part: str = "model",
    *,
    modules: Sequence[str] | None = None,
    recipe: Recipe | None = None,
    timesteps: Sequence[float] | None = None,
    timestep: Timestep = "timestep",
    reservoir: int = 0,
    name: str | None = None,
    into: Measurements | None = None,
) -> Iterator[Measurements]:
    """Measure what the linears of a model are handed while it runs.

    Memory does not grow with the run. No input is kept but the tokens of the reservoir, no graph is
    kept alive, and nothing that the model computes changes. Several forwards may run; nothing else
    may run the model at the same time.

    Args:
        model: the network whose forward is run: not compiled, its weights on a device.
        part: what the checkpoint calls it.
        modules: patterns of the modules to measure; each has to take one.
        recipe: measure what this recipe quantizes or protects. Without both: every linear.
        timesteps: edges of the timestep bins, ascending; ``None``: the model has no timesteps.
        timestep: where the model's forward gets its timestep.
        reservoir: keep so many tokens of each module, as they are.
        name: the model, as files shall call it: a repository with revision, or a path. The name of
            its class, if left out.
        into: add to these measurements, another part or more of the same; their model, bins and
            reservoir hold.

    Yields:
        What is measured; it may be merged and saved once the context has ended.

    Raises:
        InvalidInput: the model cannot be observed so. While it runs: a module was handed a NaN or
            an infinity, something that is no tensor of its input features, or a forward has no
            timestep or one outside the bins.
        ValueError: edges that do not ascend, a negative reservoir, or both ``modules`` and
            ``recipe``.
    """
    if modules is not None and recipe is not None:
        raise ValueError("give modules or a recipe, not both")
    if reservoir < 0:
        raise ValueError(f"a reservoir of {reservoir} tokens")
    _check_runs_as_it_is(model, part)
    if into is None:
        into = Measurements(name or type(model).__name__, bins_of(timesteps), reservoir)
        finds = None if timesteps is None else _finder(model, part, timestep)
    else:
        finds = None if into.bins == bins_of(None) else _finder(model, part, timestep)
    chosen = (
        by_recipe(model, recipe, part)
        if recipe is not None
        else by_patterns(model, ("**",) if modules is None else modules)
    )
    _add_part(into, part, chosen)
    observer = _Observer(into, part, chosen, finds)
    handles: list[RemovableHandle] = []
    try:
        observer.attach(model, handles)
        yield into
    finally:
        for handle in handles:
            handle.remove()


def bins_of(edges: Sequence[float] | None) -> tuple[tuple[float, float], ...]:
    """The timestep bins between edges; one bin where there are no timesteps.

    Raises:
        ValueError: there are fewer than two edges, or they do not ascend.
    """
    if edges is None:
        return ((0.0, 1.0),)
    numbers = [float(edge) for edge in edges]
    ascend = all(low < high for low, high in pairwise(numbers))
    if len(numbers) < 2 or not ascend or not all(map(math.isfinite, numbers)):
        raise ValueError(f"timesteps {numbers}: give two or more finite edges, ascending")
    return tuple(pairwise(numbers))


def _add_part(into: Measurements, part: str, chosen: Mapping[str, nn.Module]) -> None:
    weights = weight_maxima(chosen, part)
    known = into.parts.get(part)
    if known is not None:
        if [*known.modules] != [*chosen]:
            message = f"part {part!r} was observed before, with other modules"
            raise InvalidInput(Problem("cannot-merge", message, "Name the same ones."))
        return
    cpu = torch.device("cpu")
    measured = {
        name: Measured(
            ModuleSums.zeros(len(into.bins), channels_of(module), into.reservoir, cpu),
            weights[name],
        )
        for name, module in chosen.items()
    }
    into.parts[part] = MeasuredPart(measured, Siblings.of(chosen), [0] * len(into.bins))


def _check_runs_as_it_is(model: nn.Module, part: str) -> None:
    """Compiled code does not run the hooks of its modules."""
    for name, module in model.named_modules():
        if (
            isinstance(module, torch.jit.ScriptModule)
            or type(module).__name__ == "OptimizedModule"
            or module._compiled_call_impl is not None
        ):
            where = f"{name!r} of part {part!r}" if name else f"the model of part {part!r}"
            raise InvalidInput(
                Problem(
                    "compiled",
                    f"{where} is compiled, and would not say what its modules are handed",
                    hint="Observe the model as it is before it is compiled.",
                )
            )


def _finder(
    model: nn.Module, part: str, timestep: Timestep
) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Any]:
    if not isinstance(timestep, str):
        return timestep
    signature = inspect.signature(model.forward)
    takes_any = any(each.kind == each.VAR_KEYWORD for each in signature.parameters.values())
    if timestep not in signature.parameters and not takes_any:
        raise InvalidInput(
            Problem(
                "no-timestep",
                f"the forward of part {part!r} has no argument {timestep!r}",
                hint=f"It has {', '.join(signature.parameters) or 'none'}: say which one is the "
                "timestep, or give a function that finds it.",
            )
        )

    def find(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if timestep in kwargs:
            return kwargs[timestep]
        return signature.bind_partial(*args, **kwargs).arguments.get(timestep)

    return find


class _Observer:
    """One part, while it is observed."""

    def __init__(
        self,
        into: Measurements,
        part: str,
        chosen: Mapping[str, nn.Module],
        finds: Callable[[tuple[Any, ...], Mapping[str, Any]], Any] | None,
    ) -> None:
        self.into = into
        self.name = part
        self.part = into.parts[part]
        self.chosen = chosen
        self.finds = finds
        self.edges = [into.bins[0][0], *(stop for _, stop in into.bins)]
        self.depth = 0
        self.at: int | None = None
        self.identities = Identities()
        self.handed: dict[str, tuple[Hashable, ...]] = {}
        self.last: tuple[Hashable, ModuleSums] | None = None

    def attach(self, model: nn.Module, handles: list[RemovableHandle]) -> None:
        handles.append(model.register_forward_pre_hook(self._starts, with_kwargs=True))
        handles.append(model.register_forward_hook(self._finishes))
        handles.append(model.register_forward_hook(self._ends, always_call=True))
        for name, module in self.chosen.items():
            hook = partial(self._sees, name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.depth += 1
        if self.depth == 1:
            self._forget()
            self.at = 0 if self.finds is None else self._bin_of(self.finds(args, kwargs))

    def _finishes(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward has come to its end, and not to an error."""
        if self.depth != 1 or self.at is None:
            return
        self.part.passes[self.at] += 1
        self.part.siblings.refine(self.handed)
        self._check_finite(self.at)

    def _ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self.depth = max(0, self.depth - 1)
        if self.depth == 0:
            self._forget()

    def _forget(self) -> None:
        self.at = None
        self.identities.clear()
        self.handed = {}
        self.last = None

    def _bin_of(self, value: Any) -> int:
        values = value.detach().flatten().tolist() if isinstance(value, Tensor) else [value]
        bins = {self._bin_of_one(each) for each in values}
        if len(bins) != 1:
            message = f"a forward of part {self.name!r} has timesteps of several bins: {values}"
            hint = "Run inputs with timesteps of different bins one after the other."
            raise InvalidInput(Problem("no-timestep", message, hint))
        return bins.pop()

    def _bin_of_one(self, value: Any) -> int:
        if not isinstance(value, int | float) or isinstance(value, bool):
            message = f"a forward of part {self.name!r} got no timestep, but {value!r}"
            hint = "Say which argument the timestep is, or observe without timesteps."
            raise InvalidInput(Problem("no-timestep", message, hint))
        first, last = self.edges[0], self.edges[-1]
        if not first <= value <= last:
            message = f"timestep {value} of part {self.name!r} is outside {first:g} to {last:g}"
            hint = "Give edges that hold all timesteps of the run."
            raise InvalidInput(Problem("timestep-outside", message, hint))
        return min(bisect_right(self.edges, value), len(self.into.bins)) - 1

    def _sees(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        x = args[0] if args else kwargs.get("input")
        measured = self.part.modules[name].sums
        channels = measured.sums.channels
        self._check_input(name, x, channels)
        assert isinstance(x, Tensor)
        at = self._place(name)
        # Autocast would round what is summed; what inference mode makes cannot be added to later.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device_type=x.device.type, enabled=False),
        ):
            measured.add(self._summed(name, x.detach(), channels, at), at)

    def _check_input(self, name: str, x: Any, channels: int) -> None:
        if torch.compiler.is_compiling():
            message = f"{name!r} of part {self.name!r} runs in compiled code"
            hint = "Run the model as it is, without torch.compile around it."
            raise InvalidInput(Problem("compiled", message, hint))
        if isinstance(x, Tensor) and x.is_floating_point() and x.device.type != "meta":
            if x.ndim and x.shape[-1] == channels:
                return
            what = f"a tensor of shape {list(x.shape)}"
        else:
            what = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise InvalidInput(
            Problem(
                "not-an-input",
                f"{name!r} of part {self.name!r} was handed {what}, not floating-point numbers "
                f"[..., {channels}]",
                hint="Leave it out: name the modules to observe.",
                tensor=name,
            )
        )

    def _place(self, name: str) -> int:
        """The bin of what runs now."""
        if self.at is not None:
            return self.at
        if self.finds is not None:
            message = f"{name!r} of part {self.name!r} was called outside a forward of the model"
            hint = "Without one there is no timestep: observe what is called, or without timesteps."
            raise InvalidInput(Problem("no-timestep", message, hint, tensor=name))
        return 0

    def _summed(self, name: str, x: Tensor, channels: int, at: int) -> ModuleSums:
        # A call outside a forward has no siblings.
        identity = self.identities.of(x) if self.at is not None else object()
        if self.at is None:
            self.part.siblings.refine({name: identity})
        self.handed[name] = (*self.handed.get(name, ()), identity)
        if self.last is not None and self.last[0] == identity and not x.is_inference():
            return self.last[1]
        # Not every device has float64.
        there = x.cpu() if x.device.type == "mps" else x
        found = ModuleSums.of(there.reshape(-1, channels), at, self.into.reservoir)
        self.last = (identity, found)
        return found

    def _check_finite(self, at: int) -> None:
        """One look at a device for a whole forward."""
        looks: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for name in self.handed:
            absmax = self.part.modules[name].sums.sums.absmax
            looks.setdefault(absmax.device, []).append((name, absmax[at].isfinite().all()))
        fine: dict[str, bool] = {}
        for found in looks.values():
            flags = torch.stack([flag for _, flag in found]).tolist()
            fine.update(zip((name for name, _ in found), flags, strict=True))
        spoilt = [name for name in self.handed if not fine[name]]
        if spoilt:
            raise InvalidInput(
                non_finite_input(self.name, name, self.into.bins[at]) for name in spoilt
            )
