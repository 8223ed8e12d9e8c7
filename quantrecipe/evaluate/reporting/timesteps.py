"""The largest inputs of modules over timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from quantrecipe.evaluate.reporting.axes import Axis, axis, bottom_axis, left_axis
from quantrecipe.evaluate.reporting.drawing import (
    Drawing,
    Group,
    Mark,
    Path,
    Shape,
    Text,
    fitted,
)
from quantrecipe.evaluate.reporting.measured import Inputs
from quantrecipe.evaluate.reporting.wording import figure
from quantrecipe.schema.statistics import TimestepBin

_WIDTH: Final = 268
_HEIGHT: Final = 168
_LEFT: Final = 44
_TOP: Final = 42
_BOTTOM: Final = 134
_LIST: Final = 390
_ROW: Final = 32


def panels(modules: Sequence[Inputs], bins: Sequence[TimestepBin]) -> list[Drawing]:
    """A panel for each module, all with the same axes: the largest channel and the median one."""
    values = [value for module in modules for value in (*module.largest, *module.median)]
    y = axis(values, _BOTTOM, _TOP, log=True)
    x = Axis(bins[0].start, bins[-1].stop, _LEFT, _WIDTH - 8)
    return [_panel(module, bins, x, y) for module in modules]


def _panel(module: Inputs, bins: Sequence[TimestepBin], x: Axis, y: Axis) -> Drawing:
    largest = _steps(module.largest, bins, x, y)
    median = _steps(module.median, bins, x, y)
    shapes: list[Shape] = [
        Text(
            0, 13, fitted(module.name, _WIDTH - 2, 11.5, True), 11.5, bold=True, title=module.name
        ),
        Text(0, 28, fitted(_about(module), _WIDTH - 2, 10), 10, "muted"),
        *left_axis(y, _LEFT, _WIDTH - 8, 4),
        Path((*largest, *reversed(median)), fill="series1", opacity=0.12),
        Path(median, "series0", 1.6, dash="5 3"),
        Path(largest, "series1", 2),
        *bottom_axis(x, _TOP, _BOTTOM, 5),
    ]
    for at, each in enumerate(bins):
        middle = x.at((each.start + each.stop) / 2)
        title = (
            f"{each.start:g} to {each.stop:g}: largest {figure(module.largest[at])}, "
            f"median channel {figure(module.median[at])}"
        )
        shapes.append(Mark(middle, y.at(module.largest[at]), "circle", 3, "series1", title=title))
        shapes.append(Mark(middle, y.at(module.median[at]), "square", 3, "series0", title=title))
    text = f"Largest input {figure(max(module.largest))}; {_about(module)}"
    return Drawing(_WIDTH, _HEIGHT, f"{module.part}: {module.name}", text, tuple(shapes))


def _about(module: Inputs) -> str:
    return f"{module.part}, max / median {figure(module.max_to_median)}"


def _steps(
    values: Sequence[float], bins: Sequence[TimestepBin], x: Axis, y: Axis
) -> tuple[tuple[float, float], ...]:
    return tuple(
        (x.at(edge), y.at(value))
        for value, each in zip(values, bins, strict=True)
        for edge in (each.start, each.stop)
    )


def key() -> Drawing:
    """What the lines are."""
    shapes = (
        Path(((2, 10), (30, 10)), "series1", 2),
        Mark(16, 10, "circle", 3.5, "series1"),
        Text(38, 14, "largest channel", 11),
        Path(((2, 28), (30, 28)), "series0", 1.6, dash="5 3"),
        Mark(16, 28, "square", 3.5, "series0"),
        Text(38, 32, "median channel", 11),
    )
    return Drawing(_WIDTH, 40, "Legend: channels", "The largest and the median channel", shapes)


def dumbbells(modules: Sequence[Inputs]) -> Drawing:
    """One bin alone: a line for each module, from its median channel to its largest."""
    values = [value for module in modules for value in (*module.largest, *module.median)]
    x = axis(values, 12, _LIST - 12, log=True)
    bottom = 8 + _ROW * len(modules)
    shapes: list[Shape] = []
    for row, module in enumerate(modules):
        y = row * _ROW + 26
        low, high = x.at(module.median[0]), x.at(module.largest[0])
        name = f"{module.part}: {module.name}"
        shapes.append(Text(2, y - 12, fitted(name, _LIST - 4, 11), 11, title=name))
        shapes.append(
            Group(
                (
                    Path(((low, y), (high, y)), "edge", 1.6),
                    Mark(low, y, "square", 4, "series0"),
                    Mark(high, y, "circle", 4.5, "series1"),
                ),
                f"largest {figure(module.largest[0])}, median channel "
                f"{figure(module.median[0])}; {_about(module)}",
            )
        )
    shapes += bottom_axis(x, 0, bottom, 5)
    text = f"{len(modules)} modules, the spikiest first"
    return Drawing(_LIST, bottom + 22, "Largest and median channel", text, tuple(shapes))
