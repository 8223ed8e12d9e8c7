"""The network as a map: a row for each layer, a column for each kind of module."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from quantrecipe.evaluate.reporting.axes import step_of
from quantrecipe.evaluate.reporting.drawing import (
    Drawing,
    Group,
    Path,
    Rect,
    Shape,
    Text,
    fitted,
    text_width,
)
from quantrecipe.evaluate.reporting.palette import HEATS
from quantrecipe.evaluate.reporting.places import Place
from quantrecipe.evaluate.reporting.wording import figure
from quantrecipe.schema.name_groups import natural

_ROW: Final = 17
_COLUMN: Final = 44
_WIDEST: Final = 104
_SMALL: Final = 10.0
_NAME: Final = 260
_MOST_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class Cell:
    """A module on the map.

    Attributes:
        text: what stands in it: a few characters.
        heat: how noisy it is, from 0; ``None``: it is not quantized.
        kept: whether it is so on purpose.
        title: all that is known of it.
        marked: whether it is framed.
    """

    text: str
    heat: int | None
    kept: bool
    title: str
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Heats:
    """Which SQNR has which heat.

    Attributes:
        bounds: in dB, ascending: round numbers between one heat and the next.
    """

    bounds: tuple[float, ...]

    def of(self, sqnr_db: float | None) -> int:
        """The heat of an SQNR; ``None``, no noise at all, has none."""
        if sqnr_db is None or not self.bounds:
            return 0
        above = sum(sqnr_db >= bound for bound in self.bounds)
        return self._heat(len(self.bounds) - above)

    def legend(self) -> list[tuple[int, str]]:
        """Every heat that is used and what it stands for, the quiet ones first."""
        if not self.bounds:
            return [(0, "all alike")]
        low, high = figure(self.bounds[0]), figure(self.bounds[-1])
        names = [f"below {low}"]
        names += [f"{figure(a)} to {figure(b)}" for a, b in pairwise(self.bounds)]
        names.append(f"{high} and more")
        count = len(names)
        return [(self._heat(count - 1 - at), name) for at, name in enumerate(names)][::-1]

    def _heat(self, noisiness: int) -> int:
        return round(noisiness * (HEATS - 1) / len(self.bounds))


def heats(values: Iterable[float | None]) -> Heats:
    """A scale for these SQNRs, in dB: at most as many steps as there are heats."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    if not found or max(found) - min(found) < 1e-9:
        return Heats(())
    step = max(0.5, step_of(max(found) - min(found), HEATS - 1))
    first, last = math.floor(min(found) / step) + 1, math.ceil(max(found) / step) - 1
    return Heats(tuple(round(number * step, 6) for number in range(first, last + 1)))


def legend(
    scale: Heats, what: str, *, kept: bool, plain: str | None, marked: str | None = None
) -> Drawing:
    """What colours and texts of cells mean.

    Args:
        scale: of the map.
        what: is shown.
        kept: whether there are protected modules on it.
        plain: what stands in modules that nothing was done to, if there are any.
        marked: what a frame says, if cells have one.
    """
    entries: list[tuple[str, str, str | None, str]] = [
        (f"heat{heat}", name, None, "") for heat, name in scale.legend()
    ]
    if kept:
        entries.append(("plain", "protected, by reason", "edge", "P1"))
    if plain is not None:
        entries.append(("paper", "not quantized", "grid", plain))
    if marked is not None:
        entries.append(("paper", marked, "ink", ""))
    shapes: list[Shape] = [Text(1, 12, what, 11, bold=True)]
    columns, width = 2, 168
    rows = -(-len(entries) // columns)
    for index, (fill, name, stroke, text) in enumerate(entries):
        x, y = 1 + index // rows * width, 20 + index % rows * 19
        shapes.append(Rect(x, y, 34, 15, fill, stroke or "grid", radius=2))
        if text:
            tone = "on-plain" if fill == "plain" else "muted"
            shapes.append(Text(x + 17, y + 11, text, _SMALL, tone, "middle"))
        shapes.append(Text(x + 40, y + 11.5, name, 11, "ink"))
    height = 20 + rows * 19
    names = "; ".join(name for _, name, _, _ in entries)
    return Drawing(columns * width, height, f"Legend: {what}", names, tuple(shapes))


def layers_maps(title: str, cells: Mapping[Place, Cell]) -> list[Drawing]:
    """One stack of layers; of very many, as few pictures of about equally many as will do.

    Args:
        title: its part and name.
        cells: by place, all of one stack.
    """
    rows = sorted({place.index for place in cells})
    maps = -(-len(rows) // _MOST_ROWS)
    size = -(-len(rows) // maps)
    if maps == 1:
        return [_layers_map(title, cells)]
    found = []
    for start in range(0, len(rows), size):
        mine = rows[start : start + size]
        first, last = (".".join(map(str, index)) for index in (mine[0], mine[-1]))
        here = {place: cell for place, cell in cells.items() if mine[0] <= place.index <= mine[-1]}
        found.append(_layers_map(f"{title}, {first} to {last}", here))
    return found


def _layers_map(title: str, cells: Mapping[Place, Cell]) -> Drawing:
    kinds = sorted({place.kind for place in cells}, key=_kind_order)
    rows = sorted({place.index for place in cells})
    labels = {kind: _label(kind) for kind in kinds}
    left = 8 + max(text_width(".".join(map(str, row)), _SMALL) for row in rows)
    groups = Counter(group for group, _ in labels.values())
    widths = [_width(labels[kind], alone=groups[labels[kind][0]] == 1) for kind in kinds]
    starts = [left + sum(widths[:column]) for column in range(len(kinds))]
    shown = fitted(title, max(250.0, starts[-1] + widths[-1]), 12, bold=True)
    shapes: list[Shape] = [Text(0, 13, shown, 12, bold=True, title=title)]
    shapes += _header(kinds, labels, starts, widths)
    top = 54
    for row, index in enumerate(rows):
        y = top + row * _ROW
        shapes.append(Text(left - 6, y + 12, ".".join(map(str, index)), _SMALL, "muted", "end"))
    at_row = {index: row for row, index in enumerate(rows)}
    at_column = {kind: column for column, kind in enumerate(kinds)}
    for place in sorted(cells, key=lambda each: (each.index, _kind_order(each.kind))):
        column = at_column[place.kind]
        y = top + at_row[place.index] * _ROW
        shapes.append(_cell(cells[place], starts[column] + 1, y + 1, widths[column] - 2))
    width = max(starts[-1] + widths[-1] + 1, text_width(shown, 12, True) + 2)
    text = f"{len(cells)} modules: {len(rows)} layers by {len(kinds)} kinds"
    return Drawing(width, top + len(rows) * _ROW + 2, title, text, tuple(shapes))


def modules_list(title: str, cells: Mapping[str, Cell]) -> Drawing:
    """Modules outside of layers, by name."""
    shown = fitted(title, _COLUMN + _NAME, 12, bold=True)
    shapes: list[Shape] = [Text(0, 13, shown, 12, bold=True, title=title)]
    for row, name in enumerate(sorted(cells, key=natural)):
        y = 24 + row * _ROW
        shapes.append(_cell(cells[name], 1, y + 1, _COLUMN - 2))
        shapes.append(Text(_COLUMN + 6, y + 12, fitted(name, _NAME, 11), 11, title=name))
    text = f"{len(cells)} modules outside of layers"
    height = 24 + len(cells) * _ROW + 2
    return Drawing(_COLUMN + _NAME + 12, height, title, text, tuple(shapes))


def _kind_order(kind: str) -> tuple[object, ...]:
    group, label = _label(kind)
    return natural(group), natural(label)


def _label(kind: str) -> tuple[str, str]:
    """What several kinds have in common, and what is their own: its last name that is no number."""
    segments = kind.split(".")
    own = 2 if len(segments) > 1 and segments[-1].isdecimal() else 1
    return ".".join(segments[:-own]), ".".join(segments[-own:]) or "(itself)"


def _width(label: tuple[str, str], alone: bool) -> float:
    """Of a column: room for its own name, and for its group's if it is the only one of that."""
    texts = label if alone else label[1:]
    return min(_WIDEST, max(_COLUMN, *(text_width(text, _SMALL) + 8 for text in texts)))


def _header(
    kinds: Sequence[str],
    labels: Mapping[str, tuple[str, str]],
    starts: Sequence[float],
    widths: Sequence[float],
) -> list[Shape]:
    shapes: list[Shape] = []
    for column, kind in enumerate(kinds):
        label = fitted(labels[kind][1], widths[column] - 2, _SMALL)
        middle = starts[column] + widths[column] / 2
        shapes.append(Text(middle, 49, label, _SMALL, "muted", "middle", title=kind))
    column = 0
    while column < len(kinds):
        group, last = labels[kinds[column]][0], column
        while last + 1 < len(kinds) and labels[kinds[last + 1]][0] == group:
            last += 1
        if group:
            x, right = starts[column] + 2, starts[last] + widths[last] - 2
            label = fitted(group, right - x, _SMALL)
            shapes.append(Text((x + right) / 2, 31, label, _SMALL, "muted", "middle", title=group))
            shapes.append(Path(((x, 36), (right, 36)), "edge"))
        column = last + 1
    return shapes


def _cell(cell: Cell, x: float, y: float, width: float) -> Group:
    height = _ROW - 2
    if cell.heat is not None:
        fill, stroke, tone = f"heat{cell.heat}", None, f"on-heat{cell.heat}"
    elif cell.kept:
        fill, stroke, tone = "plain", "edge", "on-plain"
    else:
        fill, stroke, tone = "paper", "grid", "muted"
    inset = 2.5 if cell.marked else 0.5 if stroke else 0.0
    size = width - 2 * inset, height - 2 * inset
    box = Rect(x + inset, y + inset, *size, fill, stroke, radius=2)
    text = Text(x + width / 2, y + 11, fitted(cell.text, width, _SMALL), _SMALL, tone, "middle")
    if not cell.marked:
        return Group((box, text), cell.title)
    # Around the cell, with a gap: a frame on some heat would not be seen.
    frame = Rect(x + 0.25, y + 0.25, width - 0.5, height - 0.5, None, "ink", 1.5, radius=3)
    return Group((frame, box, text), cell.title)
