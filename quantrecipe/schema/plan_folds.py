"""Folding, planned: which modules are multiplied, what is divided, and what cannot be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from quantrecipe.schema.dtypes import is_plain
from quantrecipe.schema.folds import FoldSite, find_sites, unfitting
from quantrecipe.schema.layout_reading import PartContents
from quantrecipe.schema.plan import PlannedModule
from quantrecipe.schema.problems import Problem, Reasons
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.schemes import ScaledWeight

Key = tuple[str, str]
"""Part and name."""


@dataclass(frozen=True, slots=True)
class PlannedFolds:
    """What becomes of a recipe's ``folds``.

    Attributes:
        sites: where factors are folded, in the order of part and what they are folded into.
        problems: what cannot be.
    """

    sites: tuple[FoldSite, ...]
    problems: tuple[Problem, ...]

    @property
    def multiplied(self) -> frozenset[Key]:
        """Modules whose columns are multiplied."""
        return frozenset((site.part, name) for site in self.sites for name in site.modules)

    @property
    def divided(self) -> frozenset[Key]:
        """Modules and other tensors of which rows are divided."""
        return frozenset((site.part, name) for site in self.sites for name in site.divided)


def plan_folds(
    recipe: Recipe, contents: Mapping[str, PartContents], modules: Iterable[PlannedModule]
) -> PlannedFolds:
    """Find the sites of a recipe's edges, and hold them against what becomes of the modules.

    Args:
        recipe: whose ``folds``.
        contents: each part, with the names of the target.
        modules: as they are planned; those that are refused for another reason are not among them.
    """
    return _Folding(recipe, contents, {(one.part, one.name): one for one in modules}).run()


@dataclass(frozen=True, slots=True)
class _Folding:
    recipe: Recipe
    contents: Mapping[str, PartContents]
    planned: Mapping[Key, PlannedModule]
    reasons: Reasons = field(default_factory=Reasons)

    def run(self) -> PlannedFolds:
        sites: list[FoldSite] = []
        problems: list[Problem] = []
        used: set[tuple[int, int]] = set()
        for part, found in self.contents.items():
            folding = {
                name
                for (of, name), module in self.planned.items()
                if of == part and _is_folded(module)
            }
            there = find_sites(
                self.recipe.folds,
                part,
                {name: (one.out_features, one.in_features) for name, one in found.modules.items()},
                {name: info.shape for name, info in found.others.items()},
                folding,
            )
            used |= there.used
            problems += there.reasons
            for name in sorted(folding - there.covered):
                self._without_edge(self.planned[part, name])
            for site in there.sites:
                self._check(site, found)
            sites += there.sites
        problems += self.reasons
        return PlannedFolds(tuple(sites), (*unfitting(self.recipe.folds, used), *problems))

    def _without_edge(self, module: PlannedModule) -> None:
        self.reasons.add(
            Problem(
                "fold-without-edge",
                "no edge of 'folds' says what its input comes out of",
                'Add the edge, or use "apply": "online" with a layout that stores the factors.',
                pointer=f"/schemes/{module.scheme}/smoothing/apply",
            ),
            module.name,
        )

    def _check(self, site: FoldSite, found: PartContents) -> None:
        pointer = f"/folds/{site.edge}"
        first: PlannedModule | None = None
        for name in site.modules:
            module = self.planned.get((site.part, name))
            if module is None:
                continue
            self._kept(module, f"{pointer}/modules", "multiplied by the factors")
            if module.smoothing is None:
                continue
            if not _is_folded(module):
                message = "its input is divided where it comes from, and its scheme would do so too"
                self._refuse(f"{pointer}/modules", message, "Fold its smoothing as well.", name)
                continue
            first = first or module
            if module.smoothing != first.smoothing:
                message = f"it is smoothed otherwise than {first.name!r}, which reads the same"
                hint = "Give both the same smoothing: they share the factors."
                self._refuse(f"{pointer}/modules", message, hint, name)
        for name in site.vectors:
            dtype = found.others[name].dtype
            if not is_plain(dtype):
                message = f"it is stored as {dtype}"
                hint = "Only numbers of a plain dtype are divided."
                self._refuse(f"{pointer}/into", message, hint, name)
        upstream = self.planned.get((site.part, site.module or ""))
        if upstream is not None:
            self._kept(upstream, f"{pointer}/into", "divided by the factors")

    def _kept(self, module: PlannedModule, pointer: str, what: str) -> None:
        if module.disposition == "passthrough" and isinstance(module.weight, ScaledWeight):
            message = f"it is {what}, and passthrough_dtype keeps it in {module.weight.format}"
            hint = "Protect it, or give it to a rule."
            self._refuse(pointer, message, hint, module.name)

    def _refuse(self, pointer: str, message: str, hint: str, tensor: str) -> None:
        self.reasons.add(Problem("fold-refused", message, hint, pointer=pointer), tensor)


def _is_folded(module: PlannedModule) -> bool:
    return module.smoothing is not None and module.smoothing.apply == "fold"
