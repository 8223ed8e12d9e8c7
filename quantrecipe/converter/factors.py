"""Smoothing factors, ready: of every group of modules that share them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from quantrecipe.converter.units import Unit
from quantrecipe.formats.folding import FoldedFactors
from quantrecipe.formats.memory import as_memory
from quantrecipe.schema.placement import encode_header, file_order
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.tensors import OutputTensor


@dataclass(frozen=True, slots=True, eq=False)
class GroupFactors:
    """The factors of one group.

    Attributes:
        part: whose.
        modules: those that share them, sorted.
        alpha: what they were computed with.
        values: float32 ``[in]``, on the CPU, finite and positive; they share memory with nothing.
    """

    part: str
    modules: tuple[str, ...]
    alpha: float
    values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """The factors of any number of groups, to be asked by module.

    Attributes:
        groups: in the order of the plan.
        folds: those of them that are folded, with the places.
    """

    groups: tuple[GroupFactors, ...] = ()
    folds: FoldedFactors = field(default_factory=FoldedFactors)
    _by_module: Mapping[tuple[str, str], GroupFactors] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_module = {(group.part, name): group for group in self.groups for name in group.modules}
        object.__setattr__(self, "_by_module", by_module)

    def group_of(self, part: str, module: str) -> GroupFactors | None:
        """The group of a module; ``None`` if it is not smoothed."""
        return self._by_module.get((part, module))

    @classmethod
    def of_plan(cls, plan: Plan, groups: tuple[GroupFactors, ...]) -> Factors:
        """With the places where a plan folds some of them."""
        found, folded = cls(groups), []
        for site in plan.folds:
            shared = (found.group_of(site.part, name) for name in site.modules)
            folded.append((site, next(group.values for group in shared if group is not None)))
        return cls(groups, FoldedFactors(tuple(folded)))

    def of(self, part: str, module: str) -> Tensor | None:
        """What the columns of a module are multiplied by, float32 ``[in]``; ``None``: nothing."""
        group = self.group_of(part, module)
        return self.folds.factors(part, module) if group is None else group.values

    def for_units(self, units: Iterable[Unit]) -> Factors:
        """Those that these units need, and no others."""
        names = {(unit.of.part, unit.of.name) for unit in units}
        groups = (self.group_of(part, name) for part, name in sorted(names))
        kept = tuple(dict.fromkeys(group for group in groups if group is not None))
        return Factors(kept, self.folds.for_names(names))


def folded_file(folds: FoldedFactors) -> bytes:
    """The file of the factors that were folded, in safetensors format, by the keys of the sites."""
    values = {site.key: factors for site, factors in folds.folded}
    tensors = [OutputTensor(key, "float32", tuple(one.shape)) for key, one in values.items()]
    content = b"".join(bytes(as_memory(values[one.name])) for one in file_order(tensors))
    return encode_header(tensors, {}) + content
