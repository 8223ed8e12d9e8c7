"""What somebody's own function is handed to run a model that is calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import torch
from torch import nn

from quantrecipe.converter.calibration.folding import check_folds, copied
from quantrecipe.converter.calibration.measurements import Measurements
from quantrecipe.converter.calibration.observing import Timestep, bins_of, observe
from quantrecipe.schema.folds import fold_digest
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recipe import Fold, Recipe
from quantrecipe.schema.renaming import captured

_PROVE: Final = "Call calibration.prove_folds(model, run, part), where run() calls the model."


class Calibration:
    """One calibration: a recipe, and what was measured for it so far.

    Args:
        recipe: says which modules of which parts are measured.
        timesteps: edges of the timestep bins; ``None``: the model has no timesteps.
        reservoir: keep so many tokens of each module.

    Attributes:
        recipe: as given.
        measurements: of all parts that were observed.
    """

    def __init__(
        self, recipe: Recipe, timesteps: Sequence[float] | None = None, reservoir: int = 0
    ) -> None:
        source = recipe.source
        revision = f"@{source.revision}" if source.revision else ""
        name = f"{source.repo}{revision}" if source.repo else source.path or recipe.name
        self.recipe = recipe
        self.measurements = Measurements(name, bins_of(timesteps), reservoir)
        self._observed = 0
        self._calls: dict[str, _FirstCall] = {}
        self._faults: dict[str, tuple[Problem, ...]] = {}

    @contextmanager
    def observe(
        self, model: nn.Module, part: str = "model", *, timestep: Timestep = "timestep"
    ) -> Iterator[Measurements]:
        """Measure a part of the recipe's source while it runs within the context.

        Several parts may be observed, one after the other or at the same time. When the last
        context has ended, what the recipe folds is proven as ``prove_folds`` does, with what each
        model was called with first; why it could not be, ``unproven`` says.

        Args:
            model: the network, as for ``quantrecipe.converter.calibration.observe``.
            part: what the recipe calls it.
            timestep: where the model's forward gets its timestep.
        """
        into = self.measurements
        first = _FirstCall(model)
        with observe(model, part, recipe=self.recipe, timestep=timestep, into=into):
            handle = model.register_forward_pre_hook(first.keep, with_kwargs=True)
            self._observed += 1
            try:
                yield into
            finally:
                self._observed -= 1
                handle.remove()
        if self._folds() and first.arguments is not None:
            self._calls.setdefault(part, first)
        if not self._observed:
            self._prove()

    def _folds(self) -> bool:
        smoothed = (scheme.smoothing for scheme in self.recipe.schemes.values())
        return any(one is not None and one.apply == "fold" for one in smoothed)

    def _prove(self) -> None:
        """Prove the folds of the parts that were called; hours of measuring are not lost to it."""
        for part, first in self._calls.items():
            if any(one.part == part for one in self.measurements.folds):
                continue
            try:
                self.prove_folds(first.model, first.again, part)
            except InvalidInput as error:
                self._faults[part] = error.problems
            except Exception as error:  # noqa: BLE001 - an arbitrary model may raise anything
                message = f"part {part!r} could not be called again: {error}"
                self._faults[part] = (Problem("fold-unproven", message, _PROVE, pointer="/folds"),)
        self._calls.clear()

    def unproven(self) -> tuple[Problem, ...]:
        """Why conversions by the recipe will refuse to fold into parts that were observed."""
        if not self._folds():
            return ()
        proven = {(one.part, one.fold_sha256) for one in self.measurements.folds}
        found: list[Problem] = []
        for part, measured in self.measurements.parts.items():
            missing = [
                Problem(
                    "fold-unproven",
                    f"it was not proven on part {part!r}",
                    _PROVE,
                    pointer=f"/folds/{edge}",
                )
                for edge, fold in enumerate(self.recipe.folds)
                if (part, fold_digest(fold)) not in proven and _takes(fold, measured.modules)
            ]
            found += self._faults.get(part, missing)
        return tuple(found)

    def prove_folds(self, model: nn.Module, run: Callable[[], object], part: str = "model") -> None:
        """Prove the recipe's folds on a part, and state it in the statistics file.

        For parts that are not called as a whole while they are observed, or not with what can be
        copied. Not while a part is observed: modules are called more often than the model calls
        them.

        Args:
            model: the network, as for ``quantrecipe.converter.calibration.check_folds``.
            run: calls it as it is used; one input is enough.
            part: what the recipe calls it.

        Raises:
            InvalidInput: with every edge that is wrong or could not be proven.
        """
        proven = check_folds(model, self.recipe.folds, run, part=part)
        others = (one for one in self.measurements.folds if one.part != part)
        self.measurements.folds = (*others, *proven)
        self._faults.pop(part, None)

    def sample(self, count: int = 1) -> None:
        """Say that so many inputs were run. Without a word, every forward pass counts as one."""
        self.measurements.sample(count)

    def prompt(self, content: str | bytes) -> None:
        """Say that an input was run, and what it was: it goes into the digest of the prompts."""
        self.measurements.prompt(content)


class _FirstCall:
    """What a model is called with first, so that it can be called again.

    Attributes:
        model: which.
        arguments: positional and keyword arguments; ``None``: it was not called, or with something
            that cannot be copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._seen = False

    def keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook."""
        if not self._seen:
            self._seen = True
            with suppress(Exception):
                self.arguments = copied(args), copied(kwargs)

    def again(self) -> None:
        """Call it as then."""
        assert self.arguments is not None
        args, kwargs = self.arguments
        with torch.no_grad():
            self.model(*copied(args), **copied(kwargs))


def _takes(fold: Fold, modules: Mapping[str, object]) -> bool:
    names = [name.split(".") for name in modules]
    return any(captured(one.split("."), name) is not None for one in fold.modules for name in names)
