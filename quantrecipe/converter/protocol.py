"""What a converter is, what it is given, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from quantrecipe.checkpoint import SourceReader
from quantrecipe.converter.units import Unit
from quantrecipe.formats import RowErrors
from quantrecipe.schema.capabilities import Capabilities
from quantrecipe.schema.lock import Role

DEFAULT_BLOCK_BYTES = 16 << 20

Progress = Callable[[int, str], None]
"""Called with the bytes of source tensors just finished with, and the name of their owner."""

Write = Callable[[Role, memoryview], None]
"""Called with a role of the unit and the next bytes of it."""


def silent(count: int, name: str) -> None:
    """A ``Progress`` that says nothing."""


@dataclass(frozen=True, slots=True)
class Job:
    """One unit of a conversion, as a converter sees it.

    Attributes:
        unit: what to convert; everything that could be refused from headers has been.
        reader: the source.
        write: takes the bytes of each tensor that the unit writes (``unit.ranges``), by role, each
            from its first byte to its last, in as many pieces as there are. A byte too many is a
            ``ValueError``, one too few is noticed at the end.
        factors: of a module that is smoothed, or reads an input with one whose smoothing is folded,
            else ``None``: float32 ``[in]``, on the CPU, the same for all units of the module.
            Columns of the weight are multiplied by them, whatever it is stored as; they are written
            as they are where the unit has a role ``smoothing``.
        divisors: of a module or vector that smoothing is folded into, else ``None``: float32, one
            for each of its rows, on the CPU. ``formats.folding`` says what is divided by them;
            numbers of a bias are as well.
        statistics: the statistics files, by the paths that schemes name them by.
        block_bytes: about how many bytes of float32 numbers to hold at a time; at least one row (or
            one row of blocks) is held whatever it says. It never changes what is written.
        compiled: whether compiled loops are worth starting for a source of this size.
        device: where to compute, as torch calls it.
        progress: to be told of stretches of source that are done with; what it was not told of is
            told of when the unit is done.
    """

    unit: Unit
    reader: SourceReader
    write: Write
    factors: Tensor | None = None
    divisors: Tensor | None = None
    statistics: Mapping[str, Path] = field(default_factory=dict)
    block_bytes: int = DEFAULT_BLOCK_BYTES
    compiled: bool = False
    device: str = "cpu"
    progress: Progress = field(default=silent)


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """What storing numbers as codes cost, added up.

    Attributes:
        signal: the sum of ``w^2``.
        noise: the sum of ``(w - w_hat)^2``.
        worst_in_scales: the largest ``abs(w - w_hat) / scale``.
    """

    signal: float
    noise: float
    worst_in_scales: float

    @classmethod
    def of_blocks(cls, blocks: Iterable[RowErrors]) -> ErrorSums:
        """Of row blocks; exactly rounded sums, so that no block size shows in them."""
        kept = tuple(blocks)
        return cls(
            math.fsum(value for block in kept for value in block.signal.tolist()),
            math.fsum(value for block in kept for value in block.noise.tolist()),
            max((block.worst_in_scales for block in kept), default=0.0),
        )

    @classmethod
    def total(cls, parts: Iterable[ErrorSums]) -> ErrorSums:
        """Of several units, in whatever order."""
        kept = tuple(parts)
        return cls(
            math.fsum(part.signal for part in kept),
            math.fsum(part.noise for part in kept),
            max((part.worst_in_scales for part in kept), default=0.0),
        )


@runtime_checkable
class Converter(Protocol):
    """Carries units out. Found by entry point (group ``quantrecipe.converters``), chosen by name.

    An instance is made without arguments, one for each thread or process that works, so scratch
    memory can be kept in it. Two converters given the same unit write the same bytes, on any
    machine, and as often as they are asked to.
    """

    @property
    def name(self) -> str:
        """What it is chosen by."""

    @property
    def version(self) -> str:
        """Goes into the lock."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do; a recipe that asks for more is refused while planning."""

    def convert(self, job: Job) -> ErrorSums | None:
        """Write one unit.

        Returns:
            What was measured; ``None`` where nothing was rounded to codes.

        Raises:
            InvalidInput: the source's numbers cannot be converted (not finite, say).
        """
