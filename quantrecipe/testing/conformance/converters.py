"""A converter over one case."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from quantrecipe.checkpoint import OutputFiles, SourceReader, lay_out
from quantrecipe.converter import Converter, Means, carry_out, plan
from quantrecipe.converter.factor_stage import find_factors
from quantrecipe.converter.units import cut
from quantrecipe.converter.working import BrokenConverter, Setup, UnitWorker
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.testing.conformance.cases import Case
from quantrecipe.testing.conformance.comparing import Deviation, refusal_of
from quantrecipe.testing.conformance.files import check_written, write_case


def check_converter(converter: Converter, case: Case, folder: Path) -> None:
    """Convert as a user would, a row at a time, and in the smallest units.

    Raises:
        Deviation: what was written or refused is not what the case says.
    """
    recipe, source = write_case(case, folder)
    differences: list[str] = []
    for name, block_bytes in (("out", None), ("rows", 1)):
        out = folder / name
        refused: InvalidInput | BrokenConverter | None = None
        try:
            # What the converter declares was looked at before; planning is the same for all.
            planned = plan(recipe, source, converter="reference")
            carry_out(planned, converter, out, Means(block_bytes, jobs=1), resume=False)
        except (InvalidInput, BrokenConverter) as error:
            refused = error
        differences += _judge(case, refused, out)
    if not differences and not case.refused:
        differences += _in_small_units(converter, planned, case, folder / "units")
    if differences:
        raise Deviation(differences)


def _judge(case: Case, refused: InvalidInput | BrokenConverter | None, out: Path) -> Iterator[str]:
    if isinstance(refused, BrokenConverter):
        yield refused.fault
    elif case.refused:
        yield from refusal_of(refused, case.refused)
        if out.exists():
            yield "something was written though it was refused"
    elif refused is not None:
        yield f"refused: {refused}"
    else:
        yield from check_written(case, out)


def _in_small_units(converter: Converter, planned: Plan, case: Case, folder: Path) -> Iterator[str]:
    """As large modules are: cut into rows, each carried out by itself."""
    folder.mkdir()
    lay_out(planned.files, folder)
    setup = Setup.of(planned, converter, folder, block_bytes=1)
    units = cut(planned, unit_bytes=1)
    factors = find_factors(planned, units, setup, Means(jobs=1))
    try:
        with SourceReader(planned.source_files) as reader, OutputFiles(folder) as output:
            worker = UnitWorker(setup, reader, output, factors, "cpu")
            for unit in units:
                worker.perform(unit)
    except BrokenConverter as broken:
        yield f"cut into units: {broken.fault}"
        return
    for line in check_written(case, folder):
        yield f"cut into units: {line}"
