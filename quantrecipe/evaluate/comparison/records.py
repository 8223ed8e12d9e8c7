"""What comparing two checkpoints found, as records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

from quantrecipe.schema.schemes import AnyWeight
from quantrecipe.schema.tensors import TensorInfo

Verdict = Literal["same", "moved", "dtype", "requantized", "changed", "only-in-a", "only-in-b"]
VERDICTS: Final[tuple[Verdict, ...]] = get_args(Verdict)
"""What may have become of a module or tensor, the mildest first."""

Failure = Literal[
    "moved", "dtype", "requantized", "changed", "only-in-a", "only-in-b", "metadata", "config"
]
FAILURES: Final[tuple[Failure, ...]] = get_args(Failure)
"""Differences that a comparison may be failed for."""

DEFAULT_FAILURES: Final[frozenset[Failure]] = frozenset(
    {"dtype", "requantized", "changed", "only-in-a", "only-in-b"}
)
"""Those that change what numbers a reader gets, or in which dtype."""

Kind = Literal["module", "tensor"]
Rounding = Literal["lossless", "b-rounded", "a-rounded"]
"""How plain numbers in two dtypes go together: they are the same, or B is A rounded, or A is B."""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far the numbers of B are from those of A.

    Attributes:
        sqnr_db: ``10 log10(sum a^2 / sum (b - a)^2)``; ``None``: there is no difference, or no
            number for it.
        worst_error: the largest ``abs(b - a)``; ``None`` if a difference is not finite.
        at: where that is, or the first difference that is not finite: row and column in a module.
        in_scales: ``worst_error`` in units of the scale there: B's where B has scales, else A's;
            ``None`` without scales, where the scale is 0, and where the module is rotated.
    """

    sqnr_db: float | None
    worst_error: float | None
    at: tuple[int, ...] | None = None
    in_scales: float | None = None

    @property
    def finite(self) -> bool:
        """Whether every difference is a number."""
        return self.worst_error is not None

    @property
    def exact(self) -> bool:
        """Whether there is no difference: the same numbers, stored otherwise."""
        return self.worst_error == 0

    @property
    def decibels(self) -> float:
        """The SQNR to order by: infinite without a difference, minus infinity without a number."""
        if self.sqnr_db is not None:
            return self.sqnr_db
        return math.inf if self.exact else -math.inf


@dataclass(frozen=True, slots=True)
class Stored:
    """A module or tensor as one of the checkpoints holds it.

    Attributes:
        part: the part it is in.
        name: what the checkpoint calls it: the whole of which it is a slice, or the modules that
            it is made of.
        shape: out and in features, or the shape of the tensor.
        weight: how the weight of a module is stored; ``None`` for a tensor.
        tensors: what it consists of, by role; the one of a tensor has the role ``tensor``.
    """

    part: str
    name: str
    shape: tuple[int, ...]
    weight: AnyWeight | None
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Compared:
    """A module or another tensor, in one checkpoint and the other.

    Attributes:
        kind: whether it is a module, or a tensor of none.
        part: the part: A's name for it, or B's where A has none.
        name: the name under which both have it.
        verdict: what became of it.
        a, b: how each holds it; ``None`` where it does not.
        details: what differs, in a few words each.
        rounding: with verdict ``dtype``: how the numbers go together.
        distance: how far the numbers are from each other, where they were measured.
    """

    kind: Kind
    part: str
    name: str
    verdict: Verdict
    a: Stored | None
    b: Stored | None
    details: tuple[str, ...] = ()
    rounding: Rounding | None = None
    distance: Distance | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """Metadata, or something in a ``config.json``, that differs.

    Attributes:
        where: the file, as A calls it if it has it; ``metadata`` of the safetensors files.
        key: the metadata key, or a JSON pointer into the file; ``""`` is all of it.
        a, b: what each says, shortened; ``None`` where it says nothing.
    """

    where: str
    key: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True)
class SidePart:
    """A part of a compared checkpoint: its name, where it lies, and the layout it was read by."""

    name: str
    location: str
    layout: str


@dataclass(frozen=True, slots=True)
class SideFacts:
    """What one of two compared checkpoints is.

    Attributes:
        path: what was named.
        files, nbytes: its safetensors files.
        recipe: the name of the recipe that it says it was made by.
        parts: in the order they were found.
    """

    path: Path
    files: int
    nbytes: int
    recipe: str | None
    parts: tuple[SidePart, ...]


@dataclass(frozen=True, slots=True)
class PairedParts:
    """Parts that were compared with each other.

    Attributes:
        a, b: their names; ``None``: the other checkpoint has no such part.
        names_of: the names by which both have the same modules, where they have not by their own.
    """

    a: str | None
    b: str | None
    names_of: str | None = None


@dataclass(frozen=True, slots=True)
class Diff:
    """What comparing two checkpoints found.

    Attributes:
        a, b: the checkpoints.
        parts: what was compared with what.
        entries: every module, then every other tensor, part by part in the order of names.
        metadata, config: what differs beside the numbers.
        notes: what is worth knowing.
    """

    a: SideFacts
    b: SideFacts
    parts: tuple[PairedParts, ...]
    entries: tuple[Compared, ...]
    metadata: tuple[Setting, ...] = ()
    config: tuple[Setting, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> Verdict | Literal["different"]:
        """``same``, ``moved`` where all means the same, else ``different``."""
        found = {entry.verdict for entry in self.entries}
        if found - {"same", "moved"}:
            return "different"
        return "moved" if "moved" in found else "same"

    def counts(self, kind: Kind) -> dict[Verdict, int]:
        """How many modules or tensors there are of each verdict, all of them named."""
        found = Counter(entry.verdict for entry in self.entries if entry.kind == kind)
        return {verdict: found[verdict] for verdict in VERDICTS}

    def failed(
        self, fail_on: Collection[Failure] = DEFAULT_FAILURES, min_sqnr: float | None = None
    ) -> tuple[Compared, ...]:
        """Modules and tensors that a comparison shall be failed for.

        Args:
            fail_on: verdicts that are a failure.
            min_sqnr: the least SQNR in dB of what is none; it also holds for what cannot be
                measured because a number is not finite.
        """
        return tuple(
            entry
            for entry in self.entries
            if entry.verdict in fail_on or is_below(entry.distance, min_sqnr)
        )

    def failed_settings(
        self, fail_on: Collection[Failure] = DEFAULT_FAILURES
    ) -> tuple[Setting, ...]:
        """Differences beside the numbers that a comparison shall be failed for."""
        metadata = self.metadata if "metadata" in fail_on else ()
        return (*metadata, *(self.config if "config" in fail_on else ()))


def is_below(distance: Distance | None, min_sqnr: float | None) -> bool:
    """Whether something that was measured is farther off than it may be."""
    return distance is not None and min_sqnr is not None and distance.decibels < min_sqnr
