"""Whole images with Ideogram 4 in its full shape: INT8 by the published programs, bfloat16, FP8.

    python benchmarks/ideogram4_pipeline.py --work /a/folder/with/60/GB --json ideogram4.json

Makes a repository of random weights (FP8 branches, a text encoder of 8B, a VAE), converts the
branches to INT8 W8A8, and writes the programs that ``publish`` does. Each figure then comes from a
process of its own: the published ``usage.py`` as it is, or with another way of loading the
branches in it. All compute the same steps; the images are of random weights. ``--layers`` and
``--small-text`` shrink it, ``--toy`` makes it fit a CPU. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from _ideogram4_loading import LOADERS
from _ideogram4_repository import SMALL_TEXT, TOY, Sizes, publish, write_repository
from _measure import machine, note, require_disk
from torch import Tensor, nn

from quantrecipe.converter import convert
from quantrecipe.loaders import open_checkpoint
from quantrecipe.schema.registry import recipe_text
from quantrecipe.schema.validation import parse_recipe

RECIPE: Final = "ideogram-4-int8-w8a8-diffusers"
LAYERS: Final = 34
PROMPT: Final = "a red bicycle that leans on a yellow wall"
BYTES_PER_LAYER: Final = 2 * 2.2 * 264_582_000
"""Of a layer, in FP8 and in INT8 with half of ``w2`` in bfloat16, in both branches."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for 60 GB, which are deleted at the end")
    add("--keep", action="store_true", help="leave them there, and use them if they are there")
    add("--layers", type=int, default=LAYERS, help="of each branch, at least 3")
    add("--small-text", action="store_true", help="a narrower text encoder")
    add("--toy", action="store_true", help="a tiny pipeline, on the CPU")
    add("--size", type=int, help="of the image, in pixels (1024)")
    add("--steps", type=int, default=8)
    add("--max-tokens", type=int, default=256, help="of text, padded")
    add("--only", nargs="*", default=[*RUNS], metavar="RUN", help=f"of: {', '.join(RUNS)}")
    add("--json", type=Path, help="file for all figures")
    add("--with", dest="more", nargs="*", default=[], help=argparse.SUPPRESS)
    add("--role", choices=(*ROLES, *LOADERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = TOY if options.toy else Sizes(layers=options.layers)
    if options.small_text:
        sizes = replace(sizes, text=SMALL_TEXT)
    if options.role in ROLES:
        print(json.dumps(ROLES[options.role](options, sizes)))
    elif options.role:
        usage = published(options.work)
        usage.load = LOADERS[options.role]
        sys.argv = ["usage.py", *arguments(options), *flags(options.more)]
        usage.main()
    else:
        measure(options, sizes)


def measure(options: argparse.Namespace, sizes: Sizes) -> None:
    """Everything, each in a process of its own."""
    options.work.mkdir(parents=True, exist_ok=True)
    mine = [sys.executable, __file__, *sys.argv[1:], "--role"]
    try:
        if not (options.keep and (options.work / "int8").exists()):
            if not options.toy:
                text = 2e9 if options.small_text else 18e9
                require_disk(options.work, int(text + sizes.layers * BYTES_PER_LAYER + 2e9))
            note(f"made in {output_of([*mine, 'prepare'])} s")
        limits = output_of([*mine, "limits"])
        usage = [sys.executable, options.work / "int8" / "usage.py", *arguments(options)]
        found: dict[str, Any] = {}
        for name in options.only:
            role, more = RUNS[name]
            try:
                own = [*mine, role, "--with", *more] if role else [*usage, *flags(more)]
                found[name] = output_of(own)
            except subprocess.CalledProcessError as error:
                note(f"{name}: exit status {error.returncode}")  # the others are worth having
            else:
                note(f"{name}: {json.dumps(found[name])}")
    finally:
        if not options.keep:
            shutil.rmtree(options.work)
    report(found, limits)
    if options.json:
        options.json.write_text(json.dumps({"runs": found, "limits": limits}, indent=2))


def output_of(command: list[Any]) -> Any:
    """What a process prints as JSON in its last line."""
    result = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def arguments(options: argparse.Namespace) -> list[str]:
    """Of ``usage.py``."""
    size, work = str(side_of(options)), options.work
    files = ["--out", str(work / "image.png"), "--deps", str(work / "base")]
    image = ["--height", size, "--width", size, "--max-tokens", str(options.max_tokens)]
    how = ["--steps", str(options.steps), "--device", device_of(options).type, "--time"]
    return [PROMPT, *files, *image, *how]


def flags(names: list[str]) -> list[str]:
    """Options of ``usage.py`` that have no value."""
    return [f"--{name}" for name in names]


def side_of(options: argparse.Namespace) -> int:
    """Pixels along a side of the image."""
    return int(options.size or (64 if options.toy else 1024))


def device_of(options: argparse.Namespace) -> torch.device:
    """Where everything is computed."""
    return torch.device("cpu" if options.toy else "cuda")


def prepare(options: argparse.Namespace, sizes: Sizes) -> list[float]:
    """Write the repository and convert it: seconds of each."""
    device, base, out = device_of(options), options.work / "base", options.work / "int8"
    began = time.perf_counter()
    with torch.no_grad():
        write_repository(base, sizes, device)
    written = time.perf_counter()
    document = parse_recipe(json.dumps(recipe(sizes.layers)), RECIPE)
    convert(document, base, out, device=device.type)
    publish(out, base)
    return [round(written - began, 1), round(time.perf_counter() - written, 1)]


def recipe(layers: int) -> dict[str, Any]:
    """The built-in recipe, for fewer layers if need be."""
    text = recipe_text(RECIPE)
    every_second = ",".join(str(layer) for layer in range(0, LAYERS, 2))
    if layers != LAYERS:
        some = ",".join(str(layer) for layer in range(0, layers, 2))
        text = text.replace(f"{{0..{LAYERS - 1}}}", f"{{0..{layers - 1}}}")
        text = text.replace(every_second, some)
    document: dict[str, Any] = json.loads(text)
    document["target"]["emit_loader"] = True
    for entry in (*document["rules"], *document["protected"]):
        if layers != LAYERS:
            del entry["count"]
    return document


def published(work: Path) -> Any:
    """The published ``usage.py``, as a module."""
    sys.path.insert(0, str(work / "int8"))
    return import_module("usage")


def limits(options: argparse.Namespace, sizes: Sizes) -> dict[str, float]:
    """Operations of a step, those of them in INT8, and how fast large products are, a second."""
    import diffusers

    grid = side_of(options) // (8 if options.toy else 16)
    tokens = {"conditional": grid**2 + options.max_tokens, "unconditional": grid**2}
    with torch.device("meta"):
        branch = diffusers.Ideogram4Transformer2DModel(**sizes.branch)
    total = in_int8 = 0
    with open_checkpoint(options.work / "int8") as checkpoint:
        for part, count in tokens.items():
            modules = checkpoint.part(part).modules
            for name, module in branch.named_modules():
                if isinstance(module, nn.Linear):
                    rows = 1 if "adaln" in name or "t_embedding" in name else count
                    work = 2 * rows * module.weight.numel()
                    total += work
                    in_int8 += work if modules[name].weight.format == "int8" else 0
            total += 4 * count**2 * sizes.heads * sizes.head_dim * sizes.layers
    side = 256 if options.toy else 8192
    values = torch.randn(side, side, device=device_of(options)).bfloat16()
    codes = values.mul(30).clamp(-127, 127).to(torch.int8)
    return {
        "operations": total,
        "in_int8": in_int8,
        "bfloat16_rate": 2 * side**3 / seconds(lambda: values @ values.t()),
        "int8_rate": 2 * side**3 / seconds(lambda: torch._int_mm(codes, codes.t())),
    }


def seconds(work: Callable[[], Tensor], times: int = 20) -> float:
    """Of one call, the median of several."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        if work().is_cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def report(found: dict[str, Any], limit: dict[str, float]) -> None:
    """The table."""
    print(machine())
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    plain = limit["operations"] / limit["bfloat16_rate"]
    mixed = limit["in_int8"] / limit["int8_rate"]
    mixed += (limit["operations"] - limit["in_int8"]) / limit["bfloat16_rate"]
    print("\n| | a step, s | of bf16 | load, s | encode, s | decode, s | image, s | peak, GB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    base = found.get("bf16", {}).get("step")
    for name, each in found.items():
        ratio = f"{each['step'] / base:.2f}" if base else ""
        peak = f"{each['peak_memory'] / 1e9:.1f}" if each["peak_memory"] else ""
        times = [f"{each[key]:.2f}" for key in ("load", "encode", "decode", "image")]
        print(f"| {name} | {each['step']:.3f} | {ratio} | {' | '.join(times)} | {peak} |")
    for name, step in (("bf16", plain), ("INT8 where it is", mixed)):
        ratio = f"{step / base:.2f}" if base else ""
        print(f"| products alone, {name} | {step:.3f} | {ratio} | | | | | |")


ROLES: Final = {"prepare": prepare, "limits": limits}
RUNS: Final[dict[str, tuple[str | None, list[str]]]] = {
    "bf16": ("bfloat16", []),
    "bf16, compiled": ("bfloat16", ["compile"]),
    "fp8, load_model": ("fp8", []),
    "fp8, load_model, compiled": ("fp8", ["compile"]),
    "fp8, layerwise casting": ("layerwise", []),
    "int8": (None, []),
    "int8, compiled": (None, ["compile"]),
    "int8, --fast": (None, ["fast"]),
    "int8, --fast, compiled": (None, ["fast", "compile"]),
    "int8, --offload": (None, ["offload"]),
    "int8, --fast --offload": (None, ["fast", "offload"]),
    "int8, --fast --offload, compiled": (None, ["fast", "offload", "compile"]),
}
"""By name, who loads the branches (``None``: ``usage.py``), and its options."""

if __name__ == "__main__":
    main()
