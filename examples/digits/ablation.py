"""Convert by every recipe, draw the same digits with each, and say how far each is from bfloat16.

``python examples/digits/ablation.py`` writes ``results/``: the numbers (``ablation.json``), the
table (``ablation.md``) and the picture (``images.png``). The converted checkpoints go to
``demo-output/digits``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from denoiser.classifier import load_classifier, read
from denoiser.data import PROMPTS, Prompt
from denoiser.fidelity import LEVEL, RESAMPLES, Values, image_psnr, interval, velocity_sqnr
from denoiser.network import WEIGHTS, new_network
from denoiser.pictures import side_by_side
from denoiser.sampler import GUIDANCE, STEPS, Branches, Step, draw, drawn, trajectory
from quantrecipe.converter import convert
from quantrecipe.loaders import load_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "demo-output" / "digits"
RESULTS = HERE / "results"
REFERENCE = "bf16"
RECIPES = (
    "w8a8",
    "w8a8-protected",
    "fp8",
)
PAIRS = (("w8a8-protected", "w8a8"),)
"""Which variants are compared with each other, the one that should be better first."""
SHOWN = 12


@dataclass(frozen=True)
class Measured:
    """What one variant did, prompt by prompt: decibels, and whether the digit is read right."""

    sqnr_db: Values
    psnr_db: Values
    right: Values
    images: Tensor
    megabytes: float

    def measures(self) -> dict[str, Values]:
        """The measures by the names that results have."""
        return {"sqnr_db": self.sqnr_db, "psnr_db": self.psnr_db, "right": self.right}


def main() -> None:
    """Run everything and write the results."""
    arguments = parse()
    prompts = PROMPTS[:: arguments.every]
    branches = Branches.load()
    reference = trajectory(branches, prompts, seed=arguments.seed)
    right = rightly_read(drawn(reference), prompts)
    variants = {}
    for name in arguments.recipes or RECIPES:
        began = time.perf_counter()
        out = arguments.out / name
        size = converted(name, out)
        variants[name] = measure(load(out), reference, prompts, arguments.seed, size)
        sqnr = variants[name].sqnr_db.mean()
        seconds = time.perf_counter() - began
        print(f"{name}: velocity {sqnr:.1f} dB, {seconds:.0f} s", flush=True)
    results = summary(variants, right)
    results["setting"] = {
        "prompts": len(prompts),
        "seed": arguments.seed,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL, "kind": "percentile, over prompts"},
        "torch": torch.__version__,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2) + "\n"
    (arguments.results / "ablation.json").write_text(text, encoding="utf-8")
    (arguments.results / "ablation.md").write_text(table(results), encoding="utf-8")
    rows = {REFERENCE: drawn(reference)} | {name: seen.images for name, seen in variants.items()}
    chosen = np.random.default_rng(arguments.seed).permutation(len(prompts))[:SHOWN]
    picture = side_by_side(
        {name: images[torch.from_numpy(chosen)] for name, images in rows.items()},
        tuple(prompts[index] for index in chosen),
    )
    picture.save(arguments.results / "images.png")
    print(table(results))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", help="names below recipes/; none: all")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth prompt of 270")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that is drawn from")
    parser.add_argument("--out", type=Path, default=OUT, help="for converted checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def converted(name: str, out: Path) -> float:
    """Convert both branches by a recipe; how many megabytes they take."""
    recipe = HERE / "recipes" / f"{name}.json"
    convert(recipe, WEIGHTS, out, force=True)
    return sum(file.stat().st_size for file in out.rglob("*.safetensors")) / 1e6


def load(out: Path) -> Branches:
    """The branches of a converted checkpoint, with quantized linears in their places."""

    def loaded(part: str) -> nn.Module:
        network = new_network()
        load_model(network, out, part=part, dtype=torch.float32)
        return network.train(False)

    return Branches.load(loaded)


def measure(
    branches: Branches,
    reference: list[Step],
    prompts: tuple[Prompt, ...],
    seed: int,
    megabytes: float,
) -> Measured:
    """Compare with the reference at its own states, and where the variant itself ends up."""
    sqnr = velocity_sqnr(branches, reference, prompts)
    images = draw(branches, prompts, seed=seed)
    psnr = image_psnr(images, drawn(reference))
    return Measured(sqnr, psnr, rightly_read(images, prompts), images, megabytes)


def rightly_read(images: Tensor, prompts: tuple[Prompt, ...]) -> Values:
    """1 where the classifier reads the digit that was asked for, else 0."""
    labels = torch.tensor([prompt.label for prompt in prompts])
    return (read(load_classifier(), images) == labels).double().numpy()


def summary(variants: Mapping[str, Measured], right: Values) -> dict[str, Any]:
    """Means and intervals of every variant, of its accuracy beside bf16's, and between variants."""
    results: dict[str, Any] = {REFERENCE: {"right": spread(right)}, "variants": {}, "pairs": []}
    for name, seen in variants.items():
        entry: dict[str, Any] = {key: spread(values) for key, values in seen.measures().items()}
        entry["right_minus_bf16"] = spread(seen.right - right)
        entry["megabytes"] = round(seen.megabytes, 2)
        results["variants"][name] = entry
    for better, worse in PAIRS:
        if {better, worse} <= variants.keys():
            one, other = variants[better].measures(), variants[worse].measures()
            differences = {key: spread(one[key] - other[key]) for key in one}
            results["pairs"].append({"of": better, "minus": worse, **differences})
    return results


def spread(values: Values) -> dict[str, float]:
    """A mean and its interval, as results have them."""
    mean, low, high = interval(values)
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| variant | MB | velocity SQNR, dB | image PSNR, dB | read right | minus bf16 |",
        "|---|---|---|---|---|---|",
        f"| {REFERENCE} | | | | {percent(results[REFERENCE]['right'])} | |",
    ]
    for name, entry in results["variants"].items():
        cells = [
            name,
            f"{entry['megabytes']:.2f}",
            decibels(entry["sqnr_db"]),
            decibels(entry["psnr_db"]),
            percent(entry["right"]),
            percent(entry["right_minus_bf16"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| difference | velocity SQNR, dB | image PSNR, dB | read right |"]
    lines += ["|---|---|---|---|"]
    for pair in results["pairs"]:
        cells = [
            f"{pair['of']} less {pair['minus']}",
            decibels(pair["sqnr_db"]),
            decibels(pair["psnr_db"]),
            percent(pair["right"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def decibels(entry: Mapping[str, float]) -> str:
    """A mean with its interval."""
    return f"{entry['mean']:.1f} [{entry['low']:.1f}, {entry['high']:.1f}]"


def percent(entry: Mapping[str, float]) -> str:
    """A share with its interval, in percent."""
    return f"{entry['mean']:.1%} [{entry['low']:.1%}, {entry['high']:.1%}]"


if __name__ == "__main__":
    main()
