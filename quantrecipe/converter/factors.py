"""Smoothing factors, ready: of every group of modules that share them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from quantrecipe.converter.units import Unit


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
    """

    groups: tuple[GroupFactors, ...] = ()
    _by_module: Mapping[tuple[str, str], GroupFactors] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_module = {(group.part, name): group for group in self.groups for name in group.modules}
        object.__setattr__(self, "_by_module", by_module)

    def group_of(self, part: str, module: str) -> GroupFactors | None:
        """The group of a module; ``None`` if it is not smoothed."""
        return self._by_module.get((part, module))

    def of(self, part: str, module: str) -> Tensor | None:
        """The factors of a module, float32 ``[in]``; ``None`` if it is not smoothed."""
        group = self.group_of(part, module)
        return None if group is None else group.values

    def for_units(self, units: Iterable[Unit]) -> Factors:
        """Those that these units need, and no others."""
        groups = (self.group_of(unit.of.part, unit.of.name) for unit in units)
        return Factors(tuple(dict.fromkeys(group for group in groups if group is not None)))
