"""Pictures of a ranking. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantrecipe.checkpoint.durable import output_error
from quantrecipe.converter.ranking.choosing import Curve
from quantrecipe.converter.ranking.climbing import ORDERS, Ladder
from quantrecipe.converter.ranking.results import Group
from quantrecipe.schema.problems import QuantrecipeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNITS: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1, "bytes"))
_COLOURS: Final = {"ranked": "#1f4e79", "random": "#8a8a8a", "reverse": "#c55a11"}


def check_plotting() -> None:
    """Whether pictures can be drawn; to be asked before any work.

    Raises:
        QuantrecipeError: matplotlib is not there.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise QuantrecipeError(
            "pictures need matplotlib\n  pip install 'quantrecipe[plot]', or leave --plot out."
        ) from None


def plot(path: Path, curve: Curve, chosen: Sequence[Group], ladder: Ladder | None = None) -> None:
    """Draw bytes against noise, and a ladder beside it if there is one.

    Args:
        path: a file ending in .png or .svg; replaced if it is there.
        curve: the trade.
        chosen: what is protected.
        ladder: what was really measured.

    Raises:
        QuantrecipeError: matplotlib is not there.
        OutputError: the picture cannot be written.
    """
    check_plotting()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Ids in an SVG are random, and dates are today's, unless told otherwise.
    with rc_context({"svg.hashsalt": "quantrecipe"}):
        panels = 1 if ladder is None else 2
        figure = Figure(figsize=(6.4 * panels, 4.8), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_curve(axes[0], curve, chosen)
        if ladder is not None:
            _draw_ladder(axes[1], ladder)
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
        try:
            figure.savefig(path, dpi=150, metadata=metadata)
        except OSError as error:
            raise output_error(path, error) from error


def _draw_curve(axes: Axes, curve: Curve, chosen: Sequence[Group]) -> None:
    unit, name = next(each for each in _UNITS if curve.nbytes[-1] >= 2 * each[0] or each[0] == 1)
    sizes = [nbytes / unit for nbytes in curve.nbytes]
    axes.step(sizes, curve.noise, where="post", color=_COLOURS["ranked"], label="least noise")
    knee = curve.knee()
    _mark(axes, sizes[knee], curve.noise[knee], "o", f"knee: {len(curve.chosen(knee))} protected")
    if chosen:
        taken = frozenset(chosen)
        left = sum(group.noise for group in curve.groups if group not in taken)
        nbytes = sum(group.extra_bytes for group in chosen)
        _mark(axes, nbytes / unit, left, "D", f"chosen: {len(chosen)} protected")
    axes.set_xlabel(f"added by protecting [{name}]")
    axes.set_ylabel("noise to signal, summed over modules")
    axes.set_title("Noise left, against bytes")
    _finish(axes)


def _draw_ladder(axes: Axes, ladder: Ladder) -> None:
    for order in ORDERS:
        rungs = ladder.of(order)
        if rungs:
            sizes, values = [rung.protected for rung in rungs], [rung.value for rung in rungs]
            axes.plot(sizes, values, marker=".", color=_COLOURS[order], label=order)
    at = next(rung for rung in ladder.of("ranked") if rung.protected == ladder.knee)
    _mark(axes, at.protected, at.value, "o", f"knee: {at.protected} protected")
    axes.set_xlabel("groups protected")
    axes.set_ylabel("value of the function")
    axes.set_title("Measured, against number protected")
    _finish(axes)


def _mark(axes: Axes, x: float, y: float, marker: str, label: str) -> None:
    axes.plot(
        [x],
        [y],
        marker=marker,
        markersize=9,
        fillstyle="none",
        linestyle="none",
        color="#c00000",
        label=label,
        clip_on=False,
        zorder=3,
    )


def _finish(axes: Axes) -> None:
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4, frameon=False)
