# SPDX-License-Identifier: Apache-2.0
"""Draws a digit from four words. Needs torch, safetensors and diffusers, and what lies beside it.

    python usage.py "bold forward narrow seven" --seed 3 --out seven.png

The words: thin, medium or bold; backward, upright or forward; narrow, regular or wide; zero to
nine. The same words and seed draw the same digit, on the CPU; another processor, or another
version of torch, may round the last digits otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Ideogram4Transformer2DModel
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
)
from PIL import Image
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
FOLDERS = {"conditional": "transformer", "unconditional": "unconditional_transformer"}

VOCABULARY = (
    ("thin", "medium", "bold"),
    ("backward", "upright", "forward"),
    ("narrow", "regular", "wide"),
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
)
WORD_FEATURES = 64
WORD_SEED = 4
LARGE_FEATURES = {5: 16.0, 41: -24.0}

GRID, PATCH = 4, 2  # an image is 4 by 4 patches, each of 2 by 2 pixels, which are its channels
STEPS = 16
GUIDANCE = 2.0
ZOOM = 8


def main() -> None:
    """Draw what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("prompt", help='four words: "bold forward narrow seven"')
    parser.add_argument("--seed", type=int, default=0, help="of the noise that it is drawn from")
    parser.add_argument("--out", type=Path, default=Path("digit.png"))
    given = parser.parse_args()
    words = given.prompt.split()
    if len(words) != len(VOCABULARY) or any(
        word not in known for word, known in zip(words, VOCABULARY, strict=True)
    ):
        parser.error("; then ".join(", ".join(known) for known in VOCABULARY))
    pixels = draw(load("conditional"), load("unconditional"), words, given.seed)
    grey = np.round(127.5 - 127.5 * pixels.numpy()).astype(np.uint8)  # ink is black
    side = ZOOM * len(grey)
    Image.fromarray(grey).resize((side, side), Image.Resampling.NEAREST).save(given.out)
    print(f"{given.prompt}, seed {given.seed}: {given.out}")


def load(part: str) -> nn.Module:
    """One of both networks, its quantized linears in the place of its own."""
    # With `python -I`, nothing beside this file is found by itself.
    sys.path.insert(0, str(HERE))
    loader = importlib.import_module("safetensors_loader")
    config = json.loads((HERE / FOLDERS[part] / "config.json").read_text(encoding="utf-8"))
    network: nn.Module = Ideogram4Transformer2DModel.from_config(config)
    loader.load(network, HERE, part=part, dtype=torch.float32)
    return network.eval()


def draw(conditional: nn.Module, unconditional: nn.Module, words: list[str], seed: int) -> Tensor:
    """Euler steps along the guided velocity, from noise at time 0 to an image at time 1.

    Returns:
        float32 ``[8, 8]`` from -1 (paper) to 1 (ink).
    """
    text = word_features(words)
    nothing = text[:, :0]
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, GRID * GRID, PATCH * PATCH, generator=generator)
    for step in range(STEPS):
        time = step / STEPS
        towards = velocity(conditional, latents, time, text)
        away = velocity(unconditional, latents, time, nothing)
        latents = latents + (GUIDANCE * towards + (1 - GUIDANCE) * away) / STEPS
    patches = latents.reshape(GRID, GRID, PATCH, PATCH).transpose(1, 2)
    return patches.reshape(GRID * PATCH, GRID * PATCH).clamp(-1, 1)


def word_features(words: list[str]) -> Tensor:
    """What stands in for a text encoder: a fixed random vector a word, ``[1, 4, 64]``."""
    known = [word for column in VOCABULARY for word in column]
    random = np.random.default_rng(WORD_SEED)
    vectors = random.standard_normal((len(known), WORD_FEATURES)).astype(np.float32)
    for feature, factor in LARGE_FEATURES.items():
        vectors[:, feature] = factor * (1 + 0.1 * vectors[:, feature])
    return torch.from_numpy(vectors[[known.index(word) for word in words]])[None]


@torch.no_grad()
def velocity(network: nn.Module, latents: Tensor, time: float, text: Tensor) -> Tensor:
    """Where a network wants latents ``[1, 16, 4]`` to go; ``text`` is ``[1, T, 64]``, T maybe 0."""
    tokens = text.shape[1]
    blank = torch.zeros(1, GRID * GRID, WORD_FEATURES)
    places = torch.arange(GRID * GRID)
    axes = [torch.zeros_like(places), places // GRID, places % GRID]
    image = torch.stack(axes, 1) + IMAGE_POSITION_OFFSET
    roles = torch.full((1, tokens + GRID * GRID), OUTPUT_IMAGE_INDICATOR)
    roles[:, :tokens] = LLM_TOKEN_INDICATOR
    given: dict[str, Any] = {
        "hidden_states": torch.cat([torch.zeros(1, tokens, PATCH * PATCH), latents], 1),
        "timestep": torch.full((1,), time),
        "encoder_hidden_states": torch.cat([text, blank], 1),
        "position_ids": torch.cat([torch.arange(tokens)[:, None].expand(-1, 3), image])[None],
        "segment_ids": torch.ones_like(roles),
        "indicator": roles,
    }
    output: Tensor = network(**given, return_dict=False)[0]
    return output[:, tokens:]


if __name__ == "__main__":
    main()
