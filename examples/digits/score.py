"""Draw every prompt with each checkpoint, and score what comes out.

``python score.py bf16 int8 fp8 nf4`` takes the folder of the plain weights, against which the
others are held, and those of converted checkpoints, which are called after their folders. Into the
working folder it writes ``images/int8/bold-forward-narrow-seven-seed0.png`` and so on;
``legibility.jsonl``, how probable the classifier thinks the digit that was asked for;
``velocity-sqnr.jsonl``, decibels against the plain weights; and ``speeds.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import ablation
from denoiser.classifier import load_classifier
from denoiser.data import PROMPTS, SIDE, Prompt
from denoiser.fidelity import velocity_sqnr
from denoiser.network import load_branch
from denoiser.sampler import Branches, Step, drawn, trajectory
from quantrecipe.evaluate.metrics.scoring import Scored
from quantrecipe.evaluate.scores.bootstrap import Values

EVERY = "DIGITS_EVERY"
IMAGES = Path("images")
ZOOM = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, score, and write when all is done."""
    given = parse(arguments)
    prompts = PROMPTS[:: given.every]
    references: dict[int, list[Step]] = {}
    legible: list[Scored] = []
    close: list[Scored] = []
    speeds = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for folder in (given.plain, *given.converted):
            plain, variant, seconds = folder is given.plain, folder.name, 0.0
            branches = (
                Branches.load(partial(load_branch, weights=folder), threads)
                if plain
                else ablation.load(folder, threads)
            )
            for seed in range(given.seeds):
                began = time.perf_counter()
                taken = trajectory(branches, prompts, seed=seed)
                seconds += time.perf_counter() - began
                images = drawn(taken)
                save(images, prompts, seed, IMAGES / variant)
                found = legibility(images, prompts)
                legible += scores("legibility", found, prompts, seed, variant)
                if plain:
                    references[seed] = taken
                else:
                    found = velocity_sqnr(branches, references[seed], prompts)
                    close += scores("velocity-sqnr", found, prompts, seed, variant)
            speed = {"images_per_second": round(given.seeds * len(prompts) / seconds, 1)}
            speeds.append({"checkpoint": variant, "megabytes": megabytes(folder)} | speed)
            print(variant, *(f"{key} {value}" for key, value in speed.items()), flush=True)
    for file, found_lines in (("legibility.jsonl", legible), ("velocity-sqnr.jsonl", close)):
        text = "".join(f"{score.line()}\n" for score in found_lines)
        Path(file).write_text(text, encoding="utf-8")
    Path("speeds.json").write_text(json.dumps(speeds, indent=2) + "\n", encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plain", type=Path, help="a folder of weights as they were trained")
    parser.add_argument("converted", type=Path, nargs="+", help="what convert wrote")
    parser.add_argument("--seeds", type=int, default=3, help="images of each prompt")
    parser.add_argument(
        "--every",
        type=int,
        default=int(os.environ.get(EVERY, "1")),
        help=f"take every so manieth prompt of 270; ${EVERY} if left out",
    )
    return parser.parse_args(arguments)


@torch.no_grad()
def legibility(images: Tensor, prompts: tuple[Prompt, ...]) -> Values:
    """How probable it is, to the classifier, that each image ``[N, 64]`` shows its digit."""
    labels = torch.tensor([prompt.label for prompt in prompts])
    likely = load_classifier()(images).double().softmax(1)
    return likely.gather(1, labels[:, None])[:, 0].numpy()


def scores(
    metric: str, values: Values, prompts: tuple[Prompt, ...], seed: int, variant: str
) -> list[Scored]:
    """Values ``[N]`` as ``quantrecipe evaluate`` reads them."""
    return [
        Scored(named(prompt), seed, metric, float(value), variant)
        for prompt, value in zip(prompts, values, strict=True)
    ]


def save(images: Tensor, prompts: tuple[Prompt, ...], seed: int, folder: Path) -> None:
    """Write images ``[N, 64]`` from -1 to 1 as PNG, ink black, each pixel as 8 by 8."""
    folder.mkdir(parents=True, exist_ok=True)
    grey = np.round(127.5 - 127.5 * images.numpy()).astype(np.uint8)
    for prompt, pixels in zip(prompts, grey.reshape(-1, SIDE, SIDE), strict=True):
        picture = Image.fromarray(pixels).resize((SIDE * ZOOM,) * 2, Image.Resampling.NEAREST)
        picture.save(folder / f"{named(prompt)}-seed{seed}.png")


def named(prompt: Prompt) -> str:
    """A prompt as a name of files: ``bold-forward-narrow-seven``."""
    return "-".join(prompt.words)


def megabytes(folder: Path) -> float:
    """Of the safetensors files of both branches."""
    return round(sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6, 2)


if __name__ == "__main__":
    # Prompts go through in groups side by side; one operation is not cut up as well.
    torch.set_num_threads(1)
    main()
