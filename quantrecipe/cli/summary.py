"""What a conversion did, for people and for machines."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from quantrecipe.cli.plan_view import describe_weight
from quantrecipe.cli.tables import human_bytes
from quantrecipe.converter import Conversion
from quantrecipe.schema.lock import LOCK_NAME, LockedModule


def summary_text(done: Conversion) -> str:
    """The summary for people."""
    lock = done.lock
    rate = done.source_bytes / max(done.seconds, 1e-9)
    sizes = f"{human_bytes(done.source_bytes)} -> {human_bytes(done.output_bytes)}"
    lines = [f"{lock.recipe.name}: {sizes} in {done.seconds:.1f} s ({human_bytes(round(rate))}/s)"]
    kinds = _kinds(lock.modules)
    width = max([24, *(len(how) for how, _ in kinds)])
    for (how, weight), count in kinds.items():
        lines.append(f"  {count:>5,} {how:<{width}} {weight}")
    if lock.others:
        lines.append(f"  {len(lock.others):>5,} other tensors, copied")
    if any(m.smoothing is not None and len(m.smoothing.candidates) > 1 for m in lock.modules):
        chosen = Counter(group.alpha for group in lock.smoothing_groups or ())
        counts = ", ".join(f"{alpha:g} in {count:,}" for alpha, count in sorted(chosen.items()))
        lines.append(f"  alpha by group of siblings: {counts}")
    measured = [module for module in lock.modules if module.error is not None]
    if measured:
        worst = min(measured, key=_sqnr)
        finite = [_sqnr(module) for module in measured if math.isfinite(_sqnr(module))]
        mean = sum(finite) / len(finite) if finite else math.inf
        largest = max(measured, key=_in_scales)
        lines += [
            (
                f"  weight SQNR: worst {_decibels(_sqnr(worst))} ({_title(worst)}), "
                f"mean {_decibels(mean)}"
            ),
            f"  largest error: {_in_scales(largest):.4f} scales ({_title(largest)})",
        ]
    for output in lock.outputs:
        lines.append(f"  {done.out / output.path}  {output.bytes:,} bytes, sha256 {output.sha256}")
    lines.append(f"  {done.out / LOCK_NAME}")
    return "\n".join(lines)


def summary_json(done: Conversion) -> dict[str, Any]:
    """The summary for machines."""
    lock = done.lock
    measured = [module for module in lock.modules if module.error is not None]
    sqnr = [_sqnr(module) for module in measured]
    finite = [value for value in sqnr if math.isfinite(value)]
    return {
        "out": str(done.out),
        "recipe": lock.recipe.name,
        "recipe_sha256": lock.recipe_sha256,
        "seconds": round(done.seconds, 3),
        "source_bytes": done.source_bytes,
        "output_bytes": done.output_bytes,
        "modules": [
            {"count": count, "disposition": how, "weight": weight}
            for (how, weight), count in _kinds(lock.modules).items()
        ],
        "transfers": dict(sorted(Counter(m.transfer for m in lock.modules).items())),
        "others": len(lock.others),
        "weight_sqnr_db": {
            "worst": min(finite, default=None),
            "mean": round(sum(finite) / len(finite), 2) if finite else None,
        },
        "max_error_in_scales": max(map(_in_scales, measured), default=None),
        "files": [output.model_dump(mode="json") for output in lock.outputs],
    }


def _kinds(modules: tuple[LockedModule, ...]) -> Counter[tuple[str, str]]:
    return Counter(
        (
            f"by scheme {module.scheme}" if module.scheme is not None else module.disposition,
            describe_weight(module.weight),
        )
        for module in modules
    )


def _sqnr(module: LockedModule) -> float:
    if module.error is None or module.error.sqnr_db is None:
        return math.inf
    return module.error.sqnr_db


def _in_scales(module: LockedModule) -> float:
    return module.error.max_error_in_scales if module.error is not None else 0.0


def _decibels(value: float) -> str:
    return f"{value:.2f} dB" if math.isfinite(value) else "exact"


def _title(module: LockedModule) -> str:
    return f"{module.part}: {module.name}"
