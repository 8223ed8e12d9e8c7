"""The pictures: what every variant drew of the same noise, and the ladder.

Needs matplotlib, which brings Pillow (extra ``plot``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from denoiser.data import SIDE, Prompt

ZOOM = 6
CELL = SIDE * ZOOM + 6
LEFT, TOP = 230, 24
INK, PAPER = 20, 255
COLOURS = {"ranked": "#1f4e79", "random": "#8a8a8a", "reverse": "#c55a11"}


def side_by_side(
    rows: Mapping[str, NDArray[np.float32]], prompts: tuple[Prompt, ...]
) -> Image.Image:
    """Images ``[N, 64]`` from -1 to 1 under each heading, a column for each prompt."""
    picture = Image.new("L", (LEFT + CELL * len(prompts), TOP + CELL * len(rows)), PAPER)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=13)
    for column, prompt in enumerate(prompts):
        pen.text((LEFT + CELL * column + 6, 5), prompt.numeral, INK, font)
    for row, (name, images) in enumerate(rows.items()):
        pen.text((6, TOP + CELL * row + CELL // 3), name, INK, font)
        for column, image in enumerate(images):
            grey = (255 - (image.reshape(SIDE, SIDE) + 1) * 127.5).astype(np.uint8)
            cell = Image.fromarray(grey).resize((SIDE * ZOOM,) * 2, Image.Resampling.NEAREST)
            picture.paste(cell, (LEFT + CELL * column, TOP + CELL * row))
    return picture


def ladder_figure(climbed: Mapping[str, Any]) -> Figure:
    """Noise of the velocity against the number protected, for every order of ``climb``."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    counts = [rung["protected"] for rung in climbed["rungs"]["ranked"]]
    for order, rungs in climbed["rungs"].items():
        noise = [10 ** (-rung["sqnr_db"] / 10) for rung in rungs]
        axes.plot(counts, noise, marker=".", color=COLOURS[order], label=order)
        if order == "ranked":
            at = counts.index(climbed["knee"])
            axes.plot(counts[at], noise[at], "o", color="#c00000", ms=9, mfc="none", label="knee")
    axes.axvline(climbed["planted"], color="#444444", ls=":", label="as many as were planted")
    axes.set_yscale("log")
    axes.set_xscale("symlog", linthresh=8, linscale=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("modules protected")
    axes.set_ylabel("velocity noise, of the signal's power")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
