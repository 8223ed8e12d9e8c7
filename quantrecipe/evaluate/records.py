"""What a verification found, as records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantrecipe.schema.problems import Problem
from quantrecipe.schema.schemes import AnyScaledWeight

Progress = Callable[[int, str], None]
"""Called with the bytes just finished with, and the name of the file or module they are of."""


def silent(count: int, name: str) -> None:
    """A ``Progress`` that says nothing."""


@dataclass(frozen=True, slots=True)
class ModuleError:
    """How far a quantized module is from its source, measured from the bytes of both.

    Attributes:
        part, name: which module.
        weight: how it is stored.
        sqnr_db: ``10 log10(sum w^2 / sum (w - w_hat)^2)``; ``None``: no error at all.
        max_error_in_scales: the largest absolute error divided by the scale of its group.
        of_bound: the largest absolute error divided by the format's bound for that element; above 1
            the bound is broken.
    """

    part: str
    name: str
    weight: AnyScaledWeight
    sqnr_db: float | None
    max_error_in_scales: float
    of_bound: float


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification found.

    Attributes:
        path: the folder that was verified.
        quick: whether payloads were left unread.
        against: the source that it was held against, if it was.
        recipe: the name of the recipe; ``None`` if the lock could not be read.
        problems: everything that does not hold.
        files, tensors, modules: how many the lock vouches for.
        nbytes: bytes of the files that the lock vouches for.
        measured: with ``against``: every quantized module, the worst first.
    """

    path: Path
    quick: bool
    against: Path | None
    recipe: str | None
    problems: tuple[Problem, ...]
    files: int = 0
    tensors: int = 0
    modules: int = 0
    nbytes: int = 0
    measured: tuple[ModuleError, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether everything that was looked at holds."""
        return not self.problems
