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
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
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
    legible: list[Scored] = []
    close: list[Scored] = []
    speeds = []
    references: list[list[Step]] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for folder in (given.plain, *given.converted):
            plain, variant = folder is given.plain, folder.name
            branches = load(folder, threads, plain=plain)
            began = time.perf_counter()
            runs = [trajectory(branches, prompts, seed=seed) for seed in range(given.seeds)]
            seconds = time.perf_counter() - began
            for seed, taken in enumerate(runs):
                images = drawn(taken)
                save(images, prompts, seed, IMAGES / variant)
                found = legibility(images, prompts)
                legible += scores("legibility", found, prompts, seed, variant)
                if not plain:
                    found = velocity_sqnr(branches, references[seed], prompts)
                    close += scores("velocity-sqnr", found, prompts, seed, variant)
            references = references or runs
            speed = round(given.seeds * len(prompts) / seconds, 1)
            row = {"megabytes": megabytes(folder), "images_per_second": speed}
            speeds.append({"checkpoint": variant, **row})
            print(f"{variant}: {speed} images a second", flush=True)
    write("legibility.jsonl", (score.line() for score in legible))
    write("velocity-sqnr.jsonl", (score.line() for score in close))
    write("speeds.json", [json.dumps(speeds, indent=2)])


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


def load(folder: Path, threads: Executor, *, plain: bool) -> Branches:
    """Both branches of a folder, computed with in float32."""
    if not plain:
        return ablation.load(folder, threads)
    return Branches.load(partial(load_branch, weights=folder), threads)


@torch.no_grad()
def legibility(images: Tensor, prompts: tuple[Prompt, ...]) -> Values:
    """How probable it is, to the classifier, that each image ``[N, 64]`` shows its digit."""
    labels = torch.tensor([prompt.label for prompt in prompts])
    likely: Tensor = load_classifier()(images).double().softmax(1)
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


def write(file: str, lines: Iterable[str]) -> None:
    """Lines of text into the working folder."""
    Path(file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


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
