"""Holding a converter, perhaps somebody else's, to its plan, and the result to its bounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from quantrecipe.checkpoint import OutputWriter
from quantrecipe.checkpoint.errors import some
from quantrecipe.converter.protocol import Converter, ModuleResult
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.problems import InvalidInput, OutputError, Problem
from quantrecipe.schema.schemes import ScaledWeight


def finish(output: OutputWriter, converter: Converter) -> None:
    """Close the output, whole.

    Raises:
        OutputError: a tensor was not written to its end, or the system could not write.
    """
    try:
        output.finish()
    except ValueError as error:
        raise OutputError(
            f"converter {converter.name!r} left its work undone; nothing was published\n  {error}"
        ) from error


def check_complete(planned: Plan, results: tuple[ModuleResult, ...], converter: Converter) -> None:
    """Every module is accounted for once, with its error where numbers were rounded to codes.

    Raises:
        OutputError: one is not.
    """
    wanted = Counter((module.part, module.name) for module in planned.modules)
    given = Counter((result.part, result.name) for result in results)
    measured = {(result.part, result.name) for result in results if result.error is not None}
    unmeasured = [
        (module.part, module.name)
        for module in planned.modules
        if isinstance(module.weight, ScaledWeight)
        and not module.copied
        and (module.part, module.name) not in measured
    ]
    faults = [
        *_named("no result for", wanted - given),
        *_named("a result too many for", given - wanted),
        *(_named("no error measured for", unmeasured) if wanted == given else ()),
    ]
    if faults:
        raise OutputError(
            f"converter {converter.name!r} did not account for every module once; nothing was "
            "published\n  " + "\n  ".join(faults)
        )


def _named(what: str, modules: Iterable[tuple[str, str]]) -> Iterator[str]:
    names = [f"{part}: {name}" for part, name in modules]
    if names:
        yield f"{what} {some(names)}"


def check_bounds(planned: Plan, results: tuple[ModuleResult, ...]) -> None:
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
