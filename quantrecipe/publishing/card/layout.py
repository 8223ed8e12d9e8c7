"""The section on the layout: which tensors a module has, by how it is stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Final

from quantrecipe.evaluate.reporting.wording import count, stored_as
from quantrecipe.publishing.card.markdown import Markdown, code, codes, joined, listed, table
from quantrecipe.publishing.card.words import alike, parts_of
from quantrecipe.publishing.facts import Facts
from quantrecipe.schema.lock import Lock, LockedModule, LockedTensor

_MEANINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "weight_scale": "what codes are multiplied by",
        "weight_zero_point": "the codes that stand for 0",
        "weight_shape": "out and in features",
        "second_scale": "the second level of scales",
        "scale_offset": "what is added to scales",
        "marker": "says in JSON how the module is stored",
        "code_map": "what codes stand for",
        "scale_map": "what the codes of scales stand for",
        "zeros": "asked for by readers, and says nothing",
        "smoothing": "what inputs are divided by",
    }
)


def layout(facts: Facts) -> list[Markdown]:
    """A row for each role in each way of storing."""
    lock = facts.lock
    parts = parts_of(lock)
    ordered = sorted(lock.modules, key=lambda module: module.disposition != "quantized")
    rows = [
        (stored_as(mine[0].weight), role, *row, _MEANINGS.get(role, ""))
        for mine in alike(ordered, lambda module: stored_as(module.weight))
        for role, row in _roles(mine, several=len(parts) > 1)
    ]
    target = lock.recipe.target.layout
    name = target if isinstance(target, str) else target.name
    said = f"Layout {code(name)}"
    said += "" if isinstance(target, str) else ", written out in the recipe"
    blocks = [Markdown(f"{said}."), *_called(lock)]
    if rows:
        has = f"A module has these tensors; {code('out')} and {code('in')} are its features."
        headers = ("stored as", "role", "tensor", "dtype", "shape", "")
        blocks += [Markdown(has), table(headers, rows)]
    if lock.others:
        number = count(len(lock.others), "tensor")
        blocks.append(Markdown(f"Besides, {number} of no module, under names of their own."))
    return blocks


def _called(lock: Lock) -> Iterator[Markdown]:
    """Which file a part is in, and what its modules are called after."""
    files: dict[str, set[str]] = {}
    for module in lock.modules:
        files.setdefault(module.part, set()).update(t.file for t in module.tensors.values())
    for other in lock.others:
        files.setdefault(other.part, set()).add(other.tensor.file)
    if len(files) > 1:
        yield listed(
            Markdown(f"Part {code(part)} is in {codes(sorted(files[part]))}.")
            for part in sorted(files)
        )
    if lock.names is not None:
        names = lock.recipe.target.names
        whose = (
            f"as the names {code(names)} say" if isinstance(names, str) else "as the recipe says"
        )
        yield Markdown(f"Modules are called {whose}, not as in the source.")


def _roles(
    modules: Sequence[LockedModule], *, several: bool
) -> Iterator[tuple[str, tuple[Markdown, str, str]]]:
    roles: dict[str, list[tuple[LockedModule, LockedTensor]]] = {}
    for module in modules:
        for tensor in module.tensors.values():
            roles.setdefault(tensor.role, []).append((module, tensor))
    for role, found in roles.items():
        names = list(dict.fromkeys(_template(*each, several=several) for each in found))
        shown = [code(names[0])]
        if len(names) > 1:
            shown.append(Markdown(f"and {len(names) - 1:,} more"))
        dtypes = ", ".join(sorted({tensor.dtype for _, tensor in found}))
        yield role, (joined(shown, " "), dtypes, _shape(role, found))


def _template(module: LockedModule, tensor: LockedTensor, *, several: bool) -> str:
    """The tensor's name with ``{module}`` for the module's, and ``{part}`` for that of its part."""
    before, found, after = tensor.name.rpartition(module.name)
    if not found:
        return tensor.name
    if several:
        part = re.compile(rf"(?<![^.]){re.escape(module.part)}(?![^.])")
        before = part.sub("{part}", before, count=1)
    return f"{before}{{module}}{after}"


def _shape(role: str, found: Sequence[tuple[LockedModule, LockedTensor]]) -> str:
    """The shape in terms of ``out`` and ``in`` if one holds for all; otherwise an example."""
    ranks = {len(tensor.shape) for _, tensor in found}
    if len(ranks) == 1:
        words = [_dimension(role, found, place) for place in range(ranks.pop())]
        known = [word for word in words if word is not None]
        if len(known) == len(words):
            return f"[{', '.join(known)}]" if known else "one number"
    module, tensor = max(found, key=lambda each: prod(each[1].shape))
    return f"{list(tensor.shape)} where out is {module.shape[0]:,} and in {module.shape[1]:,}"


def _dimension(
    role: str, found: Sequence[tuple[LockedModule, LockedTensor]], place: int
) -> str | None:
    sizes = [tensor.shape[place] for _, tensor in found]
    if set(sizes) == {1}:
        return "1"
    outs, ins = ([module.shape[axis] for module, _ in found] for axis in (0, 1))
    axes = [("out", outs), ("in", ins)]
    # Of square weights only the place tells them apart.
    if place == 1 or role == "smoothing":
        axes.reverse()
    axes.append(("out * in", [out * into for out, into in zip(outs, ins, strict=True)]))
    for name, values in axes:
        if values == sizes:
            return name
    for name, values in axes:
        divisor = round(values[0] / sizes[0]) if sizes[0] else 0
        if divisor > 1 and [-(-value // divisor) for value in values] == sizes:
            return f"{name} / {divisor}"
    return f"{sizes[0]:,}" if len(set(sizes)) == 1 else None
