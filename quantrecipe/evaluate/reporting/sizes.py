"""What a checkpoint takes, by how its numbers are stored, against its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from quantrecipe.evaluate.reporting.drawing import Drawing, Rect, Shape, Text, text_width
from quantrecipe.evaluate.reporting.palette import SERIES
from quantrecipe.evaluate.reporting.wording import count, size, stored_as
from quantrecipe.schema.lock import Lock, LockedModule

_WIDTH: Final = 390
_LEFT: Final = 1
_BAR: Final = 30
_SCALES: Final = "scales and what belongs to them"
_OTHERS: Final = "tensors of no module"
_AROUND: Final = "headers, and padding between tensors"

Amounts = Mapping[str, int]
"""Bytes by what they are, the most first; what belongs to all formats comes last."""


def source_bytes(lock: Lock) -> int:
    """The bytes of all source files; a file that several parts are in counts once."""
    return sum({file.path: file.bytes for file in lock.source}.values())


def output_bytes(lock: Lock) -> int:
    """The bytes of all files with tensors."""
    return sum(file.bytes for file in lock.outputs)


def amounts(lock: Lock) -> Amounts:
    """What the output is made of; the sum is the size of its files with tensors."""
    weights: dict[str, int] = {}
    rest = dict.fromkeys((_SCALES, "biases", _OTHERS), 0)
    for module in lock.modules:
        for role, tensor in module.tensors.items():
            if role == "weight":
                kind = f"weights, {kind_of(module)}"
                weights[kind] = weights.get(kind, 0) + tensor.bytes
            else:
                rest["biases" if role == "bias" else _SCALES] += tensor.bytes
    rest[_OTHERS] = sum(other.tensor.bytes for other in lock.others)
    ordered = sorted(weights.items(), key=lambda item: (-item[1], item[0]))
    around = output_bytes(lock) - sum(weights.values()) - sum(rest.values())
    found = [*ordered, *rest.items(), (_AROUND, max(0, around))]
    return {kind: nbytes for kind, nbytes in found if nbytes}


def kind_of(module: LockedModule) -> str:
    """How a module's weight is stored, and why, in a few words."""
    kind = stored_as(module.weight)
    return kind if module.disposition == "quantized" else f"{kind}, {module.disposition}"


def tone(kinds: Sequence[str], kind: str) -> str:
    """The colour of an amount: quantized weights first, in the order of their size."""
    if not kind.startswith("weights, "):
        return {_SCALES: "edge", _OTHERS: "grid", _AROUND: "muted"}.get(kind, "plain")
    return f"series{kinds.index(kind) % SERIES}"


def bars(lock: Lock) -> Drawing:
    """Source and output, one above the other, equally many bytes equally long."""
    source, output, found = source_bytes(lock), output_bytes(lock), amounts(lock)
    longest = max(source, output, 1)
    kinds = list(found)
    shapes: list[Shape] = [
        Text(_LEFT, 13, f"source: {size(source)} in {_files(lock, before=True)}", 12, bold=True),
        Rect(_LEFT, 20, source / longest * (_WIDTH - 2), _BAR, "plain", "edge", title="source"),
    ]
    share = f", {output / source:.1%} of that" if source else ""
    top = 84
    shapes.append(
        Text(
            _LEFT,
            top - 7,
            f"output: {size(output)} in {_files(lock, before=False)}{share}",
            12,
            bold=True,
        )
    )
    x = float(_LEFT)
    for kind, nbytes in found.items():
        width = nbytes / longest * (_WIDTH - 2)
        title = f"{kind}: {size(nbytes)}"
        shapes.append(Rect(x, top, width, _BAR, tone(kinds, kind), title=title))
        number = str(kinds.index(kind) + 1)
        if kind.startswith("weights, ") and width > text_width(number, 11) + 6:
            shapes.append(Text(x + width / 2, top + 19, number, 11, "paper", "middle", bold=True))
        x += width
    shapes.append(Rect(_LEFT, top, max(0.0, x - _LEFT), _BAR, None, "edge"))
    text = f"source {size(source)}, output {size(output)}{share}"
    return Drawing(_WIDTH, top + _BAR + 2, "Bytes before and after", text, tuple(shapes))


def _files(lock: Lock, *, before: bool) -> str:
    return count(len({f.path for f in lock.source}) if before else len(lock.outputs), "file")
