"""What is worth knowing of a checkpoint and no fault of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from quantrecipe.schema.layout_reading import NOT_READ
from quantrecipe.schema.recognition import Reading, Verdict
from quantrecipe.schema.registry import NAMES, named_names
from quantrecipe.schema.renaming import new_names
from quantrecipe.schema.suspicions import flat_scales

_UNMARKED: Final = frozenset({"int8-scaled", "fp8-scaled"})


def layout_notes(verdict: Verdict, quantization: Mapping[str, Any] | None) -> Iterator[str]:
    """What its layout does not settle, and who would take it for something else.

    Args:
        verdict: what it was found to be.
        quantization: ``quantization_config`` of the ``config.json`` beside it.
    """
    reading = verdict.best
    name = reading.layout.name
    if verdict.rivals and verdict.fits:
        yield (
            f"ambiguous: {', '.join(verdict.rivals)} explains it as well as {name}; "
            "say which with --layout"
        )
    if not reading.quantized or reading.layout.config is not None:
        return
    if verdict.alike and verdict.fits:
        yield (
            f"{', '.join(verdict.alike)} would take it for the same numbers: a config.json beside "
            "it would tell whose it is"
        )
    if quantization is None and name in _UNMARKED and not reading.claimed:
        yield (
            "it has no comfy_quant markers: ComfyUI takes its codes for plain numbers and drops "
            "their scales"
        )
    flat = flat_scales(reading)
    if flat:
        yield (
            f"{len(flat)} scale tensor(s) of rows have one dimension ({flat[0].name}): a reader "
            "that multiplies by them as they are scales columns, on square weights without an error"
        )


def not_read_notes(reading: Reading) -> Iterator[str]:
    """What its own program reads of it, and this one does not."""
    unread = [problem for problem in reading.problems if problem.kind in NOT_READ]
    if unread:
        more = f" (and {len(unread) - 1} more like it)" if len(unread) > 1 else ""
        yield f"not read here: {unread[0].message}{more}"


def names_notes(reading: Reading) -> Iterator[str]:
    """Known names that would make something else of those that it has."""
    modules = [module.name for module in reading.modules()]
    for known in NAMES:
        names = named_names(known)
        used = {
            index
            for name in modules
            for index, entry in enumerate(names.names)
            if new_names(name, [entry])
        }
        if len(used) == len(names.names):
            yield (
                f"its modules are called as {known} knows them, and target.names {known!r} "
                f"renames them: {names.description or 'see quantrecipe layouts'}"
            )
