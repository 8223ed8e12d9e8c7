"""Holding a converter, perhaps somebody else's, to its plan, and the result to its bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from quantrecipe.checkpoint import SourceReader
from quantrecipe.checkpoint.errors import some
from quantrecipe.converter.protocol import Converter, ErrorSums
from quantrecipe.converter.units import Unit
from quantrecipe.converter.working import BrokenConverter, UnitResult
from quantrecipe.formats import sqnr_db
from quantrecipe.formats.constants import CONSTANTS
from quantrecipe.formats.memory import as_memory
from quantrecipe.formats.stored import Fresh, StoredRows
from quantrecipe.schema.lock import WeightError
from quantrecipe.schema.plan import Plan, PlannedModule
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.schemes import ScaledWeight
from quantrecipe.schema.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """What was measured while a module was written.

    Attributes:
        part, name: which.
        error: how far it is from its source; ``None`` if nothing was rounded to codes.
    """

    part: str
    name: str
    error: WeightError | None


def module_results(
    planned: Plan, units: Sequence[Unit], results: Sequence[UnitResult], converter: Converter
) -> tuple[ModuleResult, ...]:
    """What was measured, module by module, in the order of the plan.

    Raises:
        BrokenConverter: a module whose numbers were rounded to codes was not measured.
    """
    measured: dict[tuple[str, str], list[ErrorSums | None]] = {}
    for unit, result in zip(units, results, strict=True):
        measured.setdefault((unit.of.part, unit.of.name), []).append(result.error)
    unmeasured: list[str] = []
    found: list[ModuleResult] = []
    for module in planned.modules:
        errors = measured[module.part, module.name]
        known = [error for error in errors if error is not None]
        if _is_rounded(module) and len(known) < len(errors):
            unmeasured.append(f"{module.part}: {module.name}")
        total = weight_error(ErrorSums.total(known)) if _is_rounded(module) else None
        found.append(ModuleResult(module.part, module.name, total))
    if unmeasured:
        raise BrokenConverter(converter.name, f"no error measured for {some(unmeasured)}")
    return tuple(found)


def weight_error(sums: ErrorSums) -> WeightError:
    """The figures of the lock."""
    sqnr = sqnr_db(sums.signal, sums.noise)
    return WeightError(
        sqnr_db=None if sqnr is None else round(sqnr, 2),
        max_error_in_scales=round(sums.worst_in_scales, 6),
    )


def _is_rounded(module: PlannedModule) -> bool:
    return isinstance(module.weight, ScaledWeight) and not module.carried


def check_constants(planned: Plan) -> None:
    """Tensors of the source that have to say the same of every module do.

    Raises:
        InvalidInput: with every one that does not: its codes or scales stand for other numbers.
    """
    modules = [m.source for m in planned.modules if not CONSTANTS.isdisjoint(m.source.tensors)]
    problems: list[Problem] = []
    with SourceReader(planned.source_files) as reader:

        def read(info: TensorInfo, start: int, out: Tensor) -> None:
            reader.read_into(info, start, as_memory(out))

        for module in modules:
            try:
                StoredRows(module, read, Fresh()).check_constants()
            except InvalidInput as refused:
                problems += refused.problems
    if problems:
        raise InvalidInput(problems)


def check_bounds(planned: Plan, results: Sequence[ModuleResult]) -> None:
    """What was measured is within the recipe's bounds.

    Raises:
        InvalidInput: with every module that is not, the worst first.
    """
    least = planned.recipe.bounds.min_weight_sqnr_db
    if least is None:
        return
    missed: Mapping[str, float] = {
        f"{result.part}: {result.name}": result.error.sqnr_db
        for result in results
        if result.error is not None
        and result.error.sqnr_db is not None
        and result.error.sqnr_db < least
    }
    if missed:
        raise InvalidInput(
            Problem(
                "bound",
                f"weight SQNR of {sqnr:.2f} dB, below the recipe's bound of {least:g} dB",
                hint="Protect the module, choose a finer granularity, or lower the bound.",
                pointer="/bounds/min_weight_sqnr_db",
                tensor=name,
            )
            for name, sqnr in sorted(missed.items(), key=lambda item: item[1])
        )
