"""The section on what is quantized: by scheme, and then by dtype of what is not."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

from quantrecipe.evaluate.reporting.wording import count, stored_as
from quantrecipe.publishing.card.markdown import Markdown, code, table
from quantrecipe.publishing.card.words import alike, numbers_in, share, weights_in
from quantrecipe.publishing.facts import Facts
from quantrecipe.schema.lock import Disposition, Lock, LockedModule, LockedTensor
from quantrecipe.schema.schemes import ScaledWeight

_HEADERS: Final = (
    *("scheme", "modules", "parameters", "share", "weights", "scales"),
    *("activations", "smoothing", "rotation", "bytes"),
)
_ALIGN: Final = "lrrrlllllr"
_ORDER: Final[Sequence[Disposition]] = ("quantized", "protected", "passthrough")


def quantized(facts: Facts) -> list[Markdown]:
    """A table that adds up to all there is; columns of which nothing is to be said are left out."""
    lock = facts.lock
    total = numbers_in(lock)
    ways = sorted(alike(lock.modules, _way), key=lambda mine: _ORDER.index(mine[0].disposition))
    rows = [_of_modules(lock, mine, total) for mine in ways]
    biases = [module.tensors["bias"] for module in lock.modules if "bias" in module.tensors]
    rows += _of_tensors("biases of modules", biases, total)
    rows += _of_tensors("tensors of no module", [other.tensor for other in lock.others], total)
    nbytes = sum(tensor.bytes for _, tensor in lock.tensors())
    rows.append(("all", f"{len(lock.modules):,}", f"{total:,}", *[""] * 6, f"{nbytes:,}"))
    filled = [at for at in range(len(_HEADERS)) if any(row[at] for row in rows)]
    shown = table(
        [_HEADERS[at] for at in filled],
        [[row[at] for at in filled] for row in rows],
        "".join(_ALIGN[at] for at in filled),
    )
    return [
        shown,
        Markdown("Bytes of modules are those of weights with their scales, factors and markers."),
    ]


def _way(module: LockedModule) -> object:
    """How a module is stored and computed; of how scales were chosen a reader knows nothing."""
    ways = (module.weight, module.activation, module.smoothing, module.rotation)
    written = [each and each.model_dump_json(exclude={"quantizer"}) for each in ways]
    return module.disposition, module.scheme, *written


def _of_modules(lock: Lock, mine: Sequence[LockedModule], total: int) -> tuple[object, ...]:
    first = mine[0]
    numbers = sum(map(weights_in, mine))
    tensors = [each for m in mine for role, each in m.tensors.items() if role != "bias"]
    passed = "passed through" if first.disposition == "passthrough" else first.disposition
    return (
        code(first.scheme) if first.scheme else passed,
        *(f"{len(mine):,}", f"{numbers:,}", share(numbers, total)),
        *(stored_as(first.weight), _scales(first)),
        *(_activation(first), _smoothing(lock, mine), _rotation(first)),
        f"{sum(tensor.bytes for tensor in tensors):,}",
    )


def _of_tensors(what: str, found: Sequence[LockedTensor], total: int) -> list[tuple[object, ...]]:
    if not found:
        return []
    numbers, nbytes = sum(prod(each.shape) for each in found), sum(each.bytes for each in found)
    dtypes = ", ".join(sorted({tensor.dtype for tensor in found}))
    return [(what, "", f"{numbers:,}", share(numbers, total), dtypes, *[""] * 4, f"{nbytes:,}")]


def _scales(module: LockedModule) -> str:
    weight = module.weight
    if not isinstance(weight, ScaledWeight):
        return ""
    found = weight.scale_dtype if weight.has_scales else f"{weight.scale_dtype}, in the records"
    found += ", of two levels" if weight.has_two_levels else ""
    return found + (", with zero points" if weight.has_zero_points else "")


def _activation(module: LockedModule) -> str:
    found = module.activation
    return "" if found is None else f"{found.format} per {found.granularity}, at run time"


def _smoothing(lock: Lock, mine: Sequence[LockedModule]) -> str:
    found = mine[0].smoothing
    if found is None:
        return ""
    keys = {(module.part, module.name) for module in mine}
    groups = [
        group
        for group in lock.smoothing_groups or ()
        if any((group.part, name) in keys for name in group.modules)
    ]
    alphas = sorted({group.alpha for group in groups}) or list(found.candidates)
    said = f"{found.kind}, alpha {alphas[0]:g}"
    if len(alphas) > 1:
        said += f" to {alphas[-1]:g}, chosen for each of {count(len(groups), 'group')}"
    said += ", powers of two" if found.power_of_two else ""
    return said + (", factors stored" if found.apply == "online" else ", folded into weights")


def _rotation(module: LockedModule) -> str:
    return (
        ""
        if module.rotation is None
        else f"{module.rotation.kind}, blocks of {module.rotation.size}"
    )
