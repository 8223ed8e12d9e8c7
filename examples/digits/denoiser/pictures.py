"""The figure: what every variant drew of the same noise, one row each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from denoiser.data import SIDE, Prompt

ZOOM = 6
CELL = SIDE * ZOOM + 6
LEFT, TOP = 190, 24
INK, PAPER = 20, 255


def side_by_side(rows: Mapping[str, Tensor], prompts: tuple[Prompt, ...]) -> Image.Image:
    """Images ``[N, 64]`` from -1 to 1 under each heading, a column for each prompt."""
    picture = Image.new("L", (LEFT + CELL * len(prompts), TOP + CELL * len(rows)), PAPER)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=13)
    for column, prompt in enumerate(prompts):
        pen.text((LEFT + CELL * column + 6, 5), prompt.numeral, INK, font)
    for row, (name, images) in enumerate(rows.items()):
        pen.text((6, TOP + CELL * row + CELL // 3), name, INK, font)
        for column, image in enumerate(images):
            grey = (255 - (image.reshape(SIDE, SIDE) + 1) * 127.5).numpy().astype(np.uint8)
            cell = Image.fromarray(grey).resize((SIDE * ZOOM,) * 2, Image.Resampling.NEAREST)
            picture.paste(cell, (LEFT + CELL * column, TOP + CELL * row))
    return picture
