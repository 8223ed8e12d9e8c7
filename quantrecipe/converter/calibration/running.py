"""What somebody's own function is handed to run a model that is calibrated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import nn

from quantrecipe.converter.calibration.folding import check_folds
from quantrecipe.converter.calibration.measurements import Measurements
from quantrecipe.converter.calibration.observing import Timestep, bins_of, observe
from quantrecipe.schema.recipe import Recipe


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

    def observe(
        self, model: nn.Module, part: str = "model", *, timestep: Timestep = "timestep"
    ) -> AbstractContextManager[Measurements]:
        """Measure a part of the recipe's source while it runs within the context.

        Several parts may be observed, one after the other or at the same time.

        Args:
            model: the network, as for ``quantrecipe.converter.calibration.observe``.
            part: what the recipe calls it.
            timestep: where the model's forward gets its timestep.
        """
        into = self.measurements
        return observe(model, part, recipe=self.recipe, timestep=timestep, into=into)

    def prove_folds(self, model: nn.Module, run: Callable[[], object], part: str = "model") -> None:
        """Prove the recipe's folds on a part, and state it in the statistics file.

        Not while the part is observed: modules are called more often than the model calls them.

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

    def sample(self, count: int = 1) -> None:
        """Say that so many inputs were run. Without a word, every forward pass counts as one."""
        self.measurements.sample(count)

    def prompt(self, content: str | bytes) -> None:
        """Say that an input was run, and what it was: it goes into the digest of the prompts."""
        self.measurements.prompt(content)
