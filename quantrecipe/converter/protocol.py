"""What a converter is, what it is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from quantrecipe.checkpoint import OutputWriter
from quantrecipe.schema.capabilities import Capabilities
from quantrecipe.schema.lock import WeightError
from quantrecipe.schema.plan import Plan, PlannedTensor

DEFAULT_BLOCK_BYTES = 4 << 20

Progress = Callable[[int, str], None]
"""Called with the bytes of source tensors just finished with, and the name of their owner."""


def silent(count: int, name: str) -> None:
    """A ``Progress`` that says nothing."""


@dataclass(frozen=True, slots=True)
class Job:
    """One conversion, as a converter sees it.

    Attributes:
        plan: what to do; everything that could be refused from headers has been.
        output: the files in the making; use ``write``.
        block_bytes: about how many bytes of float32 numbers to hold at a time; at least one row (or
            one row of blocks) is held whatever it says. It never changes what is written.
        workers: how many threads may work at once, each with blocks of its own.
        progress: to be told of every stretch of source that is done with.
    """

    plan: Plan
    output: OutputWriter
    block_bytes: int = DEFAULT_BLOCK_BYTES
    progress: Progress = field(default=silent)
    workers: int = 1

    def write(self, tensor: PlannedTensor, offset: int, buffer: memoryview) -> None:
        """Write ``buffer`` to a planned tensor, from byte ``offset`` of it on; every byte once.

        Raises:
            ValueError: outside of the tensor, or written before.
            OutputError: the system could not write.
        """
        self.output.write(tensor.file, tensor.name, offset, buffer)


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """What was measured while a module was written.

    Attributes:
        part, name: which.
        error: how far it is from its source; ``None`` if it was copied byte for byte.
    """

    part: str
    name: str
    error: WeightError | None


@runtime_checkable
class Converter(Protocol):
    """Carries a plan out. Found by entry point (group ``quantrecipe.converters``), chosen by name.

    An instance is made without arguments. It must write every byte of every planned tensor through
    ``job.write`` and yield one result a module, in any order. Two converters given the same plan
    write the same bytes.
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

    def convert(self, job: Job) -> Iterator[ModuleResult]:
        """Write the output, module by module.

        Raises:
            InvalidInput: the source's numbers cannot be converted (not finite, say).
        """
