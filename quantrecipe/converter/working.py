"""Carrying units out: what a worker is told, what it does, and what it hands back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import torch
import xxhash

from quantrecipe import __version__
from quantrecipe.checkpoint import OutputFiles, SourceReader
from quantrecipe.converter.factors import Factors
from quantrecipe.converter.protocol import Converter, ErrorSums, Job, Progress, silent
from quantrecipe.converter.units import Unit
from quantrecipe.formats.transform import COMPILED_PAYS_FROM_BYTES
from quantrecipe.schema.lock import Role
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.problems import OutputError
from quantrecipe.schema.tensors import SourceFileInfo

ASSIGNMENT_BYTES: Final = 256 << 20
"""About how many bytes of source go to another process at once."""


@dataclass(frozen=True, slots=True)
class Setup:
    """All that a worker has to know beside its units, wherever it is.

    Attributes:
        converter: makes the converters that do the work.
        files: the source's files, without their tensors.
        folder: what the output's files lie below.
        statistics: as in ``Job``.
        block_bytes: as in ``Job``.
        compiled: as in ``Job``.
        version: of this package; another one might write other bytes.
    """

    converter: type[Converter]
    files: tuple[SourceFileInfo, ...]
    folder: Path
    statistics: Mapping[str, Path]
    block_bytes: int
    compiled: bool
    version: str = __version__

    @classmethod
    def of(cls, plan: Plan, converter: Converter, folder: Path, block_bytes: int) -> Setup:
        """What the workers of a plan are told."""
        return cls(
            type(converter),
            tuple(replace(file, tensors={}, metadata={}) for file in plan.source_files),
            folder,
            plan.statistics,
            block_bytes,
            plan.source_bytes >= COMPILED_PAYS_FROM_BYTES,
        )


@dataclass(frozen=True, slots=True)
class UnitResult:
    """A unit that was written.

    Attributes:
        index: which.
        digests: xxh3 (128 bits, hex) of the bytes that were written, by role.
        error: what was measured, where numbers were rounded to codes.
    """

    index: int
    digests: Mapping[Role, str]
    error: ErrorSums | None

    def as_record(self) -> dict[str, Any]:
        """For the journal."""
        error = self.error
        sums = None if error is None else [error.signal, error.noise, error.worst_in_scales]
        return {"unit": self.index, "digests": dict(self.digests), "error": sums}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> UnitResult:
        """From the journal."""
        error = None if record["error"] is None else ErrorSums(*record["error"])
        return cls(record["unit"], record["digests"], error)


class BrokenConverter(OutputError):  # noqa: N818 - reads as what it says
    """A converter did not write what its unit consists of, or did not measure it."""

    def __init__(self, name: str, fault: str) -> None:
        self.name = name
        self.fault = fault
        super().__init__(
            f"converter {name!r} does not keep to its plan; nothing was published\n  {fault}"
        )


class _Misfit(ValueError):  # noqa: N818 - reads as what it says
    """Bytes that a unit does not consist of."""


class _UnitWriter:
    """Takes the bytes of one unit, counts and hashes them, and passes them on."""

    def __init__(self, unit: Unit, output: OutputFiles) -> None:
        self._ranges = unit.ranges()
        self._output = output
        self._done = dict.fromkeys(self._ranges, 0)
        self._hashes = {role: xxhash.xxh3_128() for role in self._ranges}

    def write(self, role: Role, buffer: memoryview) -> None:
        part = self._ranges.get(role)
        if part is None:
            raise _Misfit(f"writes {role!r}, and stores {', '.join(self._ranges)} only")
        done = self._done[role]
        if done + buffer.nbytes > part.nbytes:
            excess = done + buffer.nbytes - part.nbytes
            raise _Misfit(f"{part.file} [{part.tensor}]: {excess:,} bytes too many")
        self._hashes[role].update(buffer)
        self._output.write(part.file, part.position + done, buffer)
        self._done[role] = done + buffer.nbytes

    def finish(self) -> dict[Role, str]:
        for role, part in self._ranges.items():
            missing = part.nbytes - self._done[role]
            if missing:
                raise _Misfit(f"{part.file} [{part.tensor}]: {missing:,} bytes were never written")
        return {role: found.hexdigest() for role, found in self._hashes.items()}


class UnitWorker:
    """Converts units one after the other; for one thread.

    Args:
        setup: see there.
        reader: the source.
        output: the files of the output.
        factors: of all smoothed modules among them.
        device: where to compute.
    """

    def __init__(
        self,
        setup: Setup,
        reader: SourceReader,
        output: OutputFiles,
        factors: Factors,
        device: str,
    ) -> None:
        self._setup = setup
        self._reader = reader
        self._output = output
        self._factors = factors
        self._device = device
        self._converter = setup.converter()

    def perform(
        self, unit: Unit, progress: Progress = silent, following: Unit | None = None
    ) -> UnitResult:
        """Convert a unit.

        Args:
            unit: what to convert.
            progress: told of source bytes that are done with.
            following: what will be converted after it; the disk may go ahead and read it.

        Raises:
            InvalidInput: the source's numbers cannot be converted.
            OutputError: the output could not be written.
            BrokenConverter: the converter did not write what it should.
        """
        if following is not None:
            self._reader.announce(*following.main_source)
        told = 0

        def tell(count: int, name: str) -> None:
            nonlocal told
            told += count
            progress(count, name)

        setup, writer = self._setup, _UnitWriter(unit, self._output)
        job = Job(
            unit=unit,
            reader=self._reader,
            write=writer.write,
            factors=self._factors.of(unit.of.part, unit.of.name),
            divisors=self._factors.folds.divisors(unit.of.part, unit.of.name, unit.rows),
            statistics=setup.statistics,
            block_bytes=setup.block_bytes,
            compiled=setup.compiled,
            device=self._device,
            progress=tell,
        )
        try:
            error = self._converter.convert(job)
            digests = writer.finish()
        except _Misfit as fault:
            what = f"{unit.of.part}: {unit.of.name}: {fault}"
            raise BrokenConverter(self._converter.name, what) from fault
        progress(unit.source_bytes - told, unit.of.name)
        return UnitResult(unit.index, digests, error)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Units for a worker in another process or on another machine."""

    setup: Setup
    units: tuple[Unit, ...]
    factors: Factors
    device: str


def perform(assignment: Assignment) -> list[UnitResult]:
    """Convert units and push them to the disk; any number of times, to the same bytes.

    Raises:
        InvalidInput, OutputError, SourceError: as ``UnitWorker.perform``.
    """
    setup = assignment.setup
    check_version(setup)
    with one_thread(), SourceReader(setup.files) as reader, OutputFiles(setup.folder) as output:
        reader.expect(source for unit in assignment.units for source in unit.sources())
        worker = UnitWorker(setup, reader, output, assignment.factors, assignment.device)
        ahead = [*assignment.units[1:], None]
        results = [
            worker.perform(unit, following=following)
            for unit, following in zip(assignment.units, ahead, strict=True)
        ]
        output.sync({part.file for unit in assignment.units for part in unit.ranges().values()})
    return results


def check_version(setup: Setup) -> None:
    """Refuse work that another version of this package planned.

    Raises:
        OutputError: with both versions.
    """
    if setup.version != __version__:
        raise OutputError(
            f"a worker has quantrecipe {__version__}, and {setup.version} made the plan\n"
            "  Install the same version on every machine."
        )


def in_runs(units: Iterable[Unit]) -> Iterator[tuple[Unit, ...]]:
    """Units in runs of about ``ASSIGNMENT_BYTES``."""
    run: list[Unit] = []
    size = 0
    for unit in units:
        run.append(unit)
        size += unit.source_bytes
        if size >= ASSIGNMENT_BYTES:
            yield tuple(run)
            run, size = [], 0
    if run:
        yield tuple(run)


def assign(
    setup: Setup, units: Iterable[Unit], factors: Factors, devices: tuple[str, ...]
) -> Iterator[Assignment]:
    """Hand out units in runs, each with the factors of its modules, to one device after another."""
    for run, device in zip(in_runs(units), cycle(devices), strict=False):
        yield Assignment(setup, run, factors.for_units(run), device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Blocks stay in one core's cache: more threads for one block only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
