"""The trade of bytes against noise, and the ladder of real conversions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from quantrecipe.evaluate.reporting.axes import Axis, axis, bottom_axis, left_axis
from quantrecipe.evaluate.reporting.drawing import (
    SERIES_DASHES,
    SERIES_MARKS,
    Drawing,
    Mark,
    MarkShape,
    Path,
    Shape,
    Text,
    text_width,
)
from quantrecipe.evaluate.reporting.palette import SERIES
from quantrecipe.evaluate.reporting.ranked import Ranked, Rung
from quantrecipe.evaluate.reporting.wording import count, figure, size

_WIDTH: Final = 390
_HEIGHT: Final = 316
_LEFT: Final = 56
_RIGHT: Final = _WIDTH - 14
_TOP: Final = 48
_BOTTOM: Final = 246
_MOST_POINTS: Final = 400


def curve(found: Ranked) -> Drawing:
    """The least noise for the bytes, with the knee and what was chosen."""
    first = found.noise[0] or 1.0
    left = [noise / first * 100 for noise in found.noise]
    x = axis([*found.nbytes, found.chosen_bytes], _LEFT, _RIGHT, pad=0.02)
    y = axis(left, _BOTTOM, _TOP, include=(0.0,), pad=0.02)
    kept = _thinned(found.nbytes, x, found.knee)
    points: list[tuple[float, float]] = []
    for at in kept:
        here = x.at(found.nbytes[at])
        if points:
            points.append((here, points[-1][1]))
        points.append((here, y.at(left[at])))
    knee = f"knee: {found.protected[found.knee]:,.0f} protected, {_left(left[found.knee])}"
    chosen_left = found.chosen_noise / first * 100
    chosen = f"chosen: {found.chosen_groups:,} protected, {_left(chosen_left)}"
    shapes: list[Shape] = [
        Text(0, 13, "Noise left, against bytes added", 12, bold=True),
        Text(0, 30, "% of the noise with nothing protected", 10, "muted"),
        *left_axis(y, _LEFT, _RIGHT),
        *bottom_axis(x, _TOP, _BOTTOM, 5, size),
        Text((_LEFT + _RIGHT) / 2, _BOTTOM + 30, "added by protecting", 10, "muted", "middle"),
        Path(tuple(points), "series0", 1.8),
        Mark(
            x.at(found.nbytes[found.knee]), y.at(left[found.knee]), "circle", 6, None, "worse", knee
        ),
        Mark(x.at(found.chosen_bytes), y.at(chosen_left), "diamond", 6.5, None, "series2", chosen),
        *_entries((("circle", "worse", knee), ("diamond", "series2", chosen))),
    ]
    text = (
        f"{count(len(found.nbytes), 'choice')} that no other beats. {knee}, "
        f"{size(found.nbytes[found.knee])}; {chosen}, {size(found.chosen_bytes)}."
    )
    return Drawing(_WIDTH, _HEIGHT, "Noise left, against bytes added", text, tuple(shapes))


def _left(percent: float) -> str:
    return f"{percent:.1f} % of the noise left"


def _entries(entries: Sequence[tuple[MarkShape, str, str]]) -> list[Shape]:
    shapes: list[Shape] = []
    for index, (shape, tone, text) in enumerate(entries):
        y = _HEIGHT - 26 + 17 * index
        shapes.append(Mark(8, y, shape, 5, None, tone))
        shapes.append(Text(18, y + 3.5, text, 10))
    return shapes


def _thinned(nbytes: Sequence[float], x: Axis, knee: int) -> list[int]:
    """Points of which no two are at one pixel; both ends and the knee are among them."""
    step = (x.stop - x.start) / _MOST_POINTS
    kept: list[int] = []
    for at, value in enumerate(nbytes):
        last = at == len(nbytes) - 1
        if not kept or last or at == knee or x.at(value) - x.at(nbytes[kept[-1]]) >= step:
            kept.append(at)
    return kept


def ladder(found: Ranked) -> Drawing:
    """What conversions with more and more protected measured, in each order."""
    orders = list(dict.fromkeys(rung.order for rung in found.rungs))
    values = [rung.value for rung in found.rungs]
    log = min(values) > 0 and max(values) / min(values) > 20
    x = axis([rung.protected for rung in found.rungs], _LEFT, _RIGHT, pad=0.02)
    y = axis(values, _BOTTOM, _TOP, log=log)
    shapes: list[Shape] = [
        Text(0, 13, "Converted and measured, against number protected", 12, bold=True),
        Text(0, 30, f"value, less is better{', logarithmic' if log else ''}", 10, "muted"),
        *left_axis(y, _LEFT, _RIGHT),
        *bottom_axis(x, _TOP, _BOTTOM),
        Text((_LEFT + _RIGHT) / 2, _BOTTOM + 30, "groups protected", 10, "muted", "middle"),
    ]
    entry = 8.0
    for index, order in enumerate(orders):
        mine = [rung for rung in found.rungs if rung.order == order]
        series = index % SERIES
        tone = f"series{series}"
        points = tuple((x.at(rung.protected), y.at(rung.value)) for rung in mine)
        if len(points) > 1:
            shapes.append(Path(points, tone, 1.6, dash=SERIES_DASHES[series]))
        shapes += [
            Mark(*point, SERIES_MARKS[series], 3, tone, title=_rung_title(rung))
            for point, rung in zip(points, mine, strict=True)
        ]
        shapes.append(Mark(entry, _HEIGHT - 10, SERIES_MARKS[series], 4, tone))
        shapes.append(Text(entry + 10, _HEIGHT - 6.5, order, 10))
        entry += 28 + text_width(order, 10)
    text = f"{count(len(found.rungs), 'conversion')} in {count(len(orders), 'order')}."
    knee = next(
        (r for r in found.rungs if r.order == "ranked" and r.protected == found.ladder_knee), None
    )
    if knee is not None:
        said = f"knee: {knee.protected:,} protected"
        at = x.at(knee.protected), y.at(knee.value)
        shapes.append(Mark(*at, "circle", 7, None, "worse", said))
        shapes.append(Mark(entry, _HEIGHT - 10, "circle", 5, None, "worse"))
        shapes.append(Text(entry + 10, _HEIGHT - 6.5, said, 10))
        text += f" {said}, value {figure(knee.value)}."
    return Drawing(_WIDTH, _HEIGHT, "The ladder", text, tuple(shapes))


def _rung_title(rung: Rung) -> str:
    return (
        f"{rung.order}: {rung.protected:,} protected ({count(rung.modules, 'module')}, "
        f"{size(rung.extra_bytes)} more), value {figure(rung.value)}"
    )
