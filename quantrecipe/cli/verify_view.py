"""What a verification found, for people and for machines."""

from __future__ import annotations

import math
from typing import Any

from quantrecipe.cli.plan_view import describe_weight
from quantrecipe.cli.running import SHOWN
from quantrecipe.cli.tables import human_bytes, table
from quantrecipe.evaluate import ModuleError, Verification


def verification_text(found: Verification, worst: int) -> str:
    """The verdict, what does not hold, and the worst modules."""
    lines = [_verdict(found)]
    lines += [f"error: {problem}" for problem in found.problems[:SHOWN]]
    if len(found.problems) > SHOWN:
        lines.append(f"... and {len(found.problems) - SHOWN:,} more (--json shows all)")
    if found.against is not None and found.measured:
        lines += _proof(found, worst)
    return "\n".join(lines)


def _verdict(found: Verification) -> str:
    if found.recipe is None:
        return f"broken: {found.path} has no lock that could be read"
    sizes = (
        f"{_count(found.files, 'file')}, {_count(found.tensors, 'tensor')}, "
        f"{human_bytes(found.nbytes)}"
    )
    if not found.whole:
        return f"broken: {sizes}, {_count(len(found.problems), 'problem')}"
    held = "all digests hold"
    if found.quick:
        held = "headers, sizes and small files hold, no weight was hashed"
    if found.against is not None:
        held += f", every number is what the recipe makes of {found.against}"
    return f"whole: {sizes}, {held}"


def _proof(found: Verification, worst: int) -> list[str]:
    nearest = max(found.measured, key=lambda module: module.of_bound)
    summary = (
        f"{_count(len(found.measured), 'quantized module')}: the largest error is "
        f"{nearest.of_bound:.1%} of its bound ({nearest.part}: {nearest.name})"
    )
    shown = found.measured[:worst]
    if not shown:
        return [summary]
    rows = [
        (
            module.part,
            module.name,
            describe_weight(module.weight),
            "exact" if module.sqnr_db is None else f"{module.sqnr_db:.2f}",
            f"{module.max_error_in_scales:.4f}",
            f"{module.of_bound:.1%}",
        )
        for module in shown
    ]
    headers = ("part", "module", "weight", "SQNR dB", "error / scale", "of bound")
    title = "worst first:" if len(shown) == len(found.measured) else f"the {len(shown)} worst:"
    return [summary, title, *table(rows, headers, "lllrrr").splitlines()]


def verification_json(found: Verification, worst: int) -> dict[str, Any]:
    """The same for machines; every problem is in it."""
    report: dict[str, Any] = {
        "path": str(found.path),
        "whole": found.whole,
        "quick": found.quick,
        "recipe": found.recipe,
        "files": found.files,
        "tensors": found.tensors,
        "modules": found.modules,
        "bytes": found.nbytes,
        "problems": [problem.as_dict() for problem in found.problems],
    }
    if found.against is not None:
        report["against"] = str(found.against)
        report["measured"] = len(found.measured)
        report["worst"] = [_module_json(module) for module in found.measured[:worst]]
    return report


def _module_json(module: ModuleError) -> dict[str, Any]:
    return {
        "part": module.part,
        "name": module.name,
        "weight": module.weight.model_dump(mode="json"),
        "sqnr_db": _finite(module.sqnr_db),
        "max_error_in_scales": _finite(module.max_error_in_scales),
        "of_bound": _finite(module.of_bound),
    }


def _finite(value: float | None) -> float | None:
    """JSON has no infinity; ``None`` for an SQNR is an exact weight, or one without any signal."""
    return value if value is not None and math.isfinite(value) else None


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
