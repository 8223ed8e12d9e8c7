"""Convert by every recipe, draw the same digits with each, and say how far each is from bfloat16.

``python examples/digits/ablation.py`` writes ``results/``: the numbers (``ablation.json``), tables
of them (``ablation.md``), and prompt by prompt what they come from (``ablation.npz``). All three
are written anew after every variant, so that a run which is cut off leaves what it had. The
converted checkpoints go to ``demo-output/digits``. ``--draw-only results`` draws the pictures from
these files, wherever matplotlib is.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibrate import run
from denoiser.classifier import load_classifier, read
from denoiser.data import PROMPTS, Prompt
from denoiser.fidelity import LEVEL, image_psnr, interval, velocity_sqnr
from denoiser.network import WEIGHTS, new_network
from denoiser.outliers import SPIKED, spiked_module
from denoiser.sampler import GUIDANCE, STEPS, Branches, Step, draw, drawn, trajectory
from quantrecipe.converter import convert
from quantrecipe.converter.calibration import Calibration
from quantrecipe.converter.ranking import Order, ladder, rank
from quantrecipe.evaluate.scores.bootstrap import RESAMPLES, Values
from quantrecipe.loaders import load_model
from quantrecipe.schema import load_recipe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "demo-output" / "digits"
RESULTS = HERE / "results"
REFERENCE = "bf16"
RECIPES = (
    "w8a8",
    "w8a8-smoothed",
    "w8a8-rotated",
    "w8a8-smoothed-rotated",
    "w8a8-protected",
    "w8a8-smoothed-protected",
    "w8a8-smoothed-rotated-protected",
    "fp8",
    "nf4",
    "int4",
)
PAIRS = (
    ("w8a8-smoothed", "w8a8"),
    ("w8a8-rotated", "w8a8"),
    ("w8a8-smoothed-rotated", "w8a8-smoothed"),
    ("w8a8-smoothed-rotated", "w8a8-rotated"),
    ("w8a8-protected", "w8a8"),
    ("w8a8-smoothed-protected", "w8a8-smoothed"),
    ("w8a8-smoothed-protected", "w8a8-protected"),
    ("w8a8-smoothed-protected", "w8a8-smoothed-rotated"),
    ("w8a8-smoothed-rotated-protected", "w8a8-smoothed-protected"),
    ("w8a8-smoothed-protected", "fp8"),
)
"""Which variants are compared with each other: the first one less the second."""
SHOWN = 12
STATISTICS = HERE / "recipes" / "statistics.safetensors"
LADDER_RECIPE = "w8a8-smoothed"
LADDER_EVERY = 5
ORDERS: tuple[Order, ...] = ("ranked", "random", "reverse")
RUNGS = (0, 1, 2, 4, 5, 6, 7, 8, 12, 16, 32, 64)


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
    """Run everything and write the results, or draw what was written."""
    arguments = parse()
    if arguments.draw_only is not None:
        draw_pictures(arguments.draw_only)
        return
    # Prompts go through in groups side by side; one operation is not cut up as well.
    torch.set_num_threads(1)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        compare(arguments, threads)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", help="names below recipes/; none: all")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth prompt of 270")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that is drawn from")
    parser.add_argument("--no-ladder", action="store_true", help="leave the ladder out")
    parser.add_argument(
        "--ladder-every", type=int, default=LADDER_EVERY, help="--every of the ladder"
    )
    parser.add_argument(
        "--rungs", type=int, nargs="+", default=RUNGS, help="how many modules the ladder protects"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="for converted checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--draw-only", type=Path, metavar="RESULTS", help="images.png and ladder.png, no more"
    )
    return parser.parse_args()


def compare(arguments: argparse.Namespace, threads: Executor) -> None:
    """Measure variant by variant, then climb the ladder; write after each."""
    prompts = PROMPTS[:: arguments.every]
    branches = Branches.load(threads=threads)
    reference = trajectory(branches, prompts, seed=arguments.seed)
    images = drawn(reference)
    right = rightly_read(images, prompts)
    chosen = np.random.default_rng(arguments.seed).permutation(len(prompts))[:SHOWN]
    arrays = {"shown": chosen * arguments.every, f"{REFERENCE}/images": images[chosen].numpy()}
    calibrate()
    variants: dict[str, Measured] = {}
    for name in arguments.recipes or RECIPES:
        began = time.perf_counter()
        out = arguments.out / name
        size = converted(name, out)
        seen = measure(load(out, threads), reference, prompts, arguments.seed, size)
        seconds = time.perf_counter() - began
        print(f"{name}: velocity {seen.sqnr_db.mean():.1f} dB, {seconds:.0f} s", flush=True)
        variants[name] = seen
        arrays |= {f"{name}/{key}": values for key, values in seen.measures().items()}
        arrays[f"{name}/images"] = seen.images[chosen].numpy()
        results = {"setting": setting(arguments, len(prompts))} | summary(variants, right)
        write(arguments.results, results, arrays)
    if not arguments.no_ladder:
        results["ladder"] = climb(branches, arguments)
        write(arguments.results, results, arrays)
    print(table(results))


def setting(arguments: argparse.Namespace, prompts: int) -> dict[str, Any]:
    """What the numbers hold for."""
    return {
        "prompts": prompts,
        "seed": arguments.seed,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL, "kind": "percentile, over prompts"},
        "torch": torch.__version__,
    }


def write(folder: Path, results: Mapping[str, Any], arrays: Mapping[str, Values]) -> None:
    """Numbers, tables and arrays; no pictures, which need more than this."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2) + "\n"
    (folder / "ablation.json").write_text(text, encoding="utf-8")
    (folder / "ablation.md").write_text(table(results), encoding="utf-8")
    np.savez_compressed(
        folder / "ablation.npz",
        allow_pickle=False,
        **{
            key: values.astype(np.float32) if values.dtype == np.float64 else values
            for key, values in arrays.items()
        },
    )


def draw_pictures(folder: Path) -> None:
    """What the variants drew, and the ladder if there is one, from the files of a run."""
    from denoiser.pictures import ladder_figure, side_by_side

    results = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
    with np.load(folder / "ablation.npz") as arrays:
        rows = {name: arrays[f"{name}/images"] for name in (REFERENCE, *results["variants"])}
        prompts = tuple(PROMPTS[index] for index in arrays["shown"])
    side_by_side(rows, prompts).save(folder / "images.png")
    if "ladder" in results:
        ladder_figure(results["ladder"]).savefig(folder / "ladder.png", dpi=150)


def calibrate() -> None:
    """Measure what the recipes smooth and rank by, as ``quantrecipe calibrate`` does."""
    recipe = load_recipe(HERE / "recipes" / f"{LADDER_RECIPE}.json")
    calibration = Calibration(recipe, timesteps=(0, 0.25, 0.5, 0.75, 1), reservoir=128)
    run(calibration)
    calibration.measurements.save(STATISTICS, force=True)


def climb(branches: Branches, arguments: argparse.Namespace) -> dict[str, Any]:
    """Protect the noisiest N by ``rank``, others as often, and see what is left of the velocity.

    Noise is a ratio of powers, that of the difference over that of the velocity: the geometric
    mean over prompts, as decibels are averaged. The knee is that of ``quantrecipe rank``.
    """
    recipe = HERE / "recipes" / f"{LADDER_RECIPE}.json"
    prompts = PROMPTS[:: arguments.ladder_every]
    reference = trajectory(branches, prompts, seed=arguments.seed)
    ranking = rank(recipe, WEIGHTS, statistics=STATISTICS, tie_siblings=False)
    planted = {(part, spiked_module(layer)) for part in SPIKED for layer in SPIKED[part]}
    noisiest = {module.key for module in ranking.modules[: len(planted)]}

    def noise(out: Path) -> float:
        decibels = velocity_sqnr(load(out, branches.threads), reference, prompts).mean()
        print(f"  velocity {decibels:.1f} dB", flush=True)
        return float(10 ** (-decibels / 10))

    climbed = ladder(
        recipe,
        WEIGHTS,
        ranking,
        noise,
        arguments.rungs,
        against=ORDERS[1:],
        notice=lambda text: print(text, flush=True),
    )
    return {
        "recipe": LADDER_RECIPE,
        "prompts": len(prompts),
        "groups": len(ranking.groups),
        "planted": len(planted),
        "planted_among_the_noisiest": len(planted & noisiest),
        "knee": climbed.knee,
        "rungs": {
            order: [
                {
                    "protected": rung.protected,
                    "modules": rung.modules,
                    "extra_bytes": rung.extra_bytes,
                    "sqnr_db": round(-10 * float(np.log10(rung.value)), 2),
                }
                for rung in climbed.of(order)
            ]
            for order in ORDERS
        },
    }


def converted(name: str, out: Path) -> float:
    """Convert both branches by a recipe; how many megabytes they take."""
    recipe = HERE / "recipes" / f"{name}.json"
    convert(recipe, WEIGHTS, out, force=True)
    return sum(file.stat().st_size for file in out.rglob("*.safetensors")) / 1e6


def load(out: Path, threads: Executor | None = None) -> Branches:
    """The branches of a converted checkpoint, with quantized linears in their places."""

    def loaded(part: str) -> nn.Module:
        network = new_network()
        load_model(network, out, part=part, dtype=torch.float32)
        return network.train(False)

    return Branches.load(loaded, threads)


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
    if "ladder" in results:
        lines += ["", *ladder_table(results["ladder"])]
    return "\n".join(lines) + "\n"


def ladder_table(climbed: Mapping[str, Any]) -> list[str]:
    """The ladder as Markdown: velocity SQNR by number protected."""
    rungs = climbed["rungs"]
    lines = [
        f"| protected | {' | '.join(f'{order}, dB' for order in rungs)} |",
        "|---" * (len(rungs) + 1) + "|",
    ]
    for row in zip(*rungs.values(), strict=True):
        count, marks = row[0]["protected"], []
        if count == climbed["planted"]:
            marks.append("planted")
        if count == climbed["knee"]:
            marks.append("knee")
        head = f"{count} ({', '.join(marks)})" if marks else str(count)
        cells = [head, *(f"{rung['sqnr_db']:.1f}" for rung in row)]
        lines.append(f"| {' | '.join(cells)} |")
    found, planted = climbed["planted_among_the_noisiest"], climbed["planted"]
    lines += ["", f"{climbed['recipe']}, {climbed['prompts']} prompts. Of the {planted} planted "]
    lines[-1] += f"modules, {found} are among the {planted} that the ranking has first."
    return lines


def decibels(entry: Mapping[str, float]) -> str:
    """A mean with its interval."""
    return f"{entry['mean']:.1f} [{entry['low']:.1f}, {entry['high']:.1f}]"


def percent(entry: Mapping[str, float]) -> str:
    """A share with its interval, in percent."""
    return f"{entry['mean']:.1%} [{entry['low']:.1%}, {entry['high']:.1%}]"


if __name__ == "__main__":
    main()
