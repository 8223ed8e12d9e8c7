# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
"""Makes an image with the quantized checkpoint that lies beside this file.

    python usage.py "a red bicycle" --out bicycle.png
    python usage.py "a red bicycle" --out bicycle.png --offload     # on a smaller GPU

Needs torch, safetensors, huggingface_hub, diffusers and transformers. The rest of the pipeline, all
but its quantized components, is fetched by download_deps.py when this runs first.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypedDict

import diffusers
import torch
from download_deps import FetchError, fetch
from torch import Tensor, nn

Stage = Literal["encode", "denoise", "decode"]


class Component(TypedDict):
    """A quantized component of the pipeline."""

    part: str  # of the checkpoint
    library: str  # that its class is in
    class_name: str
    config: str  # the path of its config.json ...
    config_from: Literal["here", "dependencies"]  # ... below this folder, or what is fetched


# What the pipeline is, by the names that it has for its components; stored names of modules that
# those call otherwise, see safetensors_loader.load; and whether only the package quantrecipe can
# compute with what is stored.
# <pipeline>
PIPELINE = ""
COMPONENTS: dict[str, Component] = {}
NAMES: tuple[tuple[str, tuple[str, ...]], ...] = ()
NEEDS_QUANTRECIPE = False
# </pipeline>

HERE = Path(__file__).resolve().parent


class UsageError(Exception):
    """Something was asked for that cannot be had; the message says what to do about it."""


def assemble(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    *,
    offload: bool = False,
    fast: bool = False,
    compiled: bool = False,
    dependencies: Path | None = None,
) -> Any:
    """The pipeline. Of its quantized components, unquantized weights are never read.

    Args:
        device: where it computes.
        dtype: of all numbers that are not quantized.
        offload: leave it on the CPU, for ``Stages`` to move.
        fast: use the kernels of the package quantrecipe.
        compiled: have torch compile the blocks of quantized components, when they first run.
        dependencies: a folder for what is fetched; None: the Hub's cache.
    """
    loader = fast_loader() if fast or NEEDS_QUANTRECIPE else import_module("safetensors_loader")
    folder = fetch(dependencies)
    place = torch.device("cpu") if offload else device
    quantized = {
        name: load(each, folder, place, dtype, loader) for name, each in COMPONENTS.items()
    }
    pipeline = getattr(diffusers, PIPELINE).from_pretrained(
        folder, **quantized, dtype=dtype, low_cpu_mem_usage=find_spec("accelerate") is not None
    )
    if compiled:
        for model in quantized.values():
            compile_blocks(model)
    return pipeline if offload else pipeline.to(device)


def load(
    component: Component,
    dependencies: Path,
    device: torch.device,
    dtype: torch.dtype,
    loader: Any,
) -> nn.Module:
    """A quantized component; each of its tensors is read once, straight to the device."""
    root = HERE if component["config_from"] == "here" else dependencies
    config = json.loads((root / component["config"]).read_text("utf-8"))
    config.pop("quantization_config", None)  # for from_pretrained, which is not used
    kind = getattr(import_module(component["library"]), component["class_name"])
    model: nn.Module
    with loader.without_weights():
        if component["library"] == "diffusers":
            model = kind.from_config(config)
        else:
            model = kind(kind.config_class.from_dict(config))
    where: dict[str, Any] = {"part": component["part"], "device": device, "dtype": dtype}
    if hasattr(loader, "load_model"):
        loader.load_model(model, HERE, **where)
    else:
        loader.load(model, HERE, **where, names=NAMES)
    return model.eval()


def fast_loader() -> Any:
    """The loaders of the package quantrecipe."""
    if NAMES:
        raise UsageError("--fast does not rename modules, and this checkpoint needs that")
    try:
        return import_module("quantrecipe.loaders")
    except ModuleNotFoundError as error:
        hint = "" if NEEDS_QUANTRECIPE else ", or leave --fast out"
        raise UsageError(f"install quantrecipe{hint} ({error})") from error


def compile_blocks(model: Any) -> None:
    """Compile each kind of block once, or the whole where nothing says what its blocks are."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks()
    else:
        model.compile()


class Stages:
    """Encoding the prompt, denoising, decoding: how long they take, and what they compute with.

    Encoding and decoding begin with what has to be moved for them; a step does not.

    Args:
        pipeline: what is watched from now on.
        device: where it computes.
        offload: whether the components of one stage at a time are there, and the others on the CPU.
    """

    def __init__(self, pipeline: Any, device: torch.device, offload: bool) -> None:
        self.device = device
        self.stage: Stage | None = None
        self.seconds = {"encode": 0.0, "decode": 0.0}
        self.steps: list[float] = []
        self.step_began = 0.0
        # Each tensor with its numbers on the CPU, which stay there: none is ever copied back.
        self.homes: dict[Stage, list[tuple[Tensor, Tensor]]] = {}
        for name, module in pipeline.components.items():
            if not isinstance(module, nn.Module):
                continue
            stage = stage_of(name)
            if stage == "denoise":
                module.register_forward_pre_hook(lambda *_: self.enter("denoise"))
            if offload:
                tensors = [*module.parameters(), *module.buffers()]
                self.homes.setdefault(stage, []).extend((each, each.data) for each in tensors)
        kind = type(pipeline)
        called_back = "callback_on_step_end" in inspect.signature(kind.__call__).parameters
        self.callbacks = {"callback_on_step_end": self.after_step} if called_back else {}
        if offload:  # the pipeline would look where its components are
            pipeline.__class__ = type(kind.__name__, (kind,), {"_execution_device": device})
        # Pipelines call parts of encoders and of the VAE, which hooks on modules do not notice.
        pipeline.encode_prompt = self.timed("encode", pipeline.encode_prompt)
        pipeline.vae.decode = self.timed("decode", pipeline.vae.decode)

    def enter(self, stage: Stage | None) -> None:
        """Have the components of a stage on the device, and no others."""
        if stage == self.stage:
            return
        if self.stage is not None:
            for tensor, home in self.homes.get(self.stage, ()):
                tensor.data = home
        if stage is not None:
            for tensor, home in self.homes.get(stage, ()):
                tensor.data = home.to(self.device)
        self.stage, self.step_began = stage, self.now()

    def timed(self, stage: Literal["encode", "decode"], work: Callable[..., Any]) -> Any:
        """A function that does its work in a stage."""

        def working(*positional: Any, **named: Any) -> Any:
            began = self.now()
            self.enter(stage)
            result = work(*positional, **named)
            self.seconds[stage] += self.now() - began
            return result

        return working

    def after_step(self, *_: object) -> dict[str, Any]:
        """What the pipeline calls after each step."""
        now = self.now()
        self.steps.append(now - self.step_began)
        self.step_began = now
        return {}

    def now(self) -> float:
        """Seconds, after all that the device was told to do."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()


def stage_of(component: str) -> Stage:
    """When a component is needed, by what pipelines call it."""
    if "encoder" in component:
        return "encode"
    return "decode" if "vae" in component else "denoise"


def arguments(pipeline: type, options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as the pipeline calls it; the rest is left to its defaults."""
    accepted = inspect.signature(pipeline.__call__).parameters
    asked = {
        "height": options.height,
        "width": options.width,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "max_sequence_length": options.max_tokens,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    unknown = given.keys() - accepted.keys()
    if unknown:
        raise UsageError(f"{PIPELINE} has no {', '.join(sorted(unknown))}")
    if "guidance_schedule" in accepted:  # a scale for each step, in place of one for all
        if options.guidance is not None:
            given["guidance_schedule"] = None
        elif options.steps is not None:
            schedule = accepted["guidance_schedule"].default
            given["guidance_schedule"] = resampled(schedule, options.steps)
    # Made on the CPU: the same noise for every device.
    return {**given, "generator": torch.Generator().manual_seed(options.seed)}


def resampled(schedule: Sequence[float], steps: int) -> list[float]:
    """A schedule for another number of steps: each value has the same share of them."""
    return [schedule[(2 * step + 1) * len(schedule) // (2 * steps)] for step in range(steps)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make an image with the quantized checkpoint.")
    add = parser.add_argument
    add("prompt")
    add("--out", type=Path, default=Path("image.png"), help="the image (default: image.png)")
    add("--device", type=device_of, default=best_device(), help="cuda, mps or cpu")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--height", type=int, help="pixels")
    add("--width", type=int, help="pixels")
    add("--steps", type=int, help="of denoising")
    add("--guidance", type=float, metavar="SCALE", help="one scale for all steps")
    add("--max-tokens", type=int, metavar="N", help="that the prompt may have; fewer are faster")
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    add("--offload", action="store_true", help="only what is needed at a time is on the device")
    add("--fast", action="store_true", help="use the GPU kernels of the package quantrecipe")
    add("--compile", action="store_true", help="slow to start, and faster then")
    add("--deps", type=Path, metavar="DIR", help="folder for what is fetched (default: the cache)")
    add("--time", action="store_true", help="print what was measured, as JSON")
    options = parser.parse_args()
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    return options


def device_of(name: str) -> torch.device:
    """A device of this machine."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error


def best_device() -> torch.device:
    """The fastest there is."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Make the image; what was measured, in seconds and bytes."""
    began = time.perf_counter()
    given = arguments(getattr(diffusers, PIPELINE), options)
    pipeline = assemble(
        options.device,
        getattr(torch, options.dtype),
        offload=options.offload,
        fast=options.fast,
        compiled=options.compile,
        dependencies=options.deps,
    )
    stages = Stages(pipeline, options.device, options.offload)
    loaded = stages.now()
    result = pipeline(options.prompt, **given, **stages.callbacks)
    done = stages.now()
    stages.enter(None)
    result.images[0].save(options.out)
    on_gpu = options.device.type == "cuda"
    return {
        "load": loaded - began,
        **stages.seconds,
        "step": statistics.median(stages.steps) if stages.steps else None,
        "steps": len(stages.steps),
        "image": done - loaded,
        "peak_memory": torch.cuda.max_memory_allocated(options.device) if on_gpu else None,
    }


def main() -> None:
    """Make an image."""
    options = parse()
    try:
        measured = generate(options)
    except (UsageError, FetchError, ValueError) as error:  # pipelines refuse with the last
        sys.exit(f"error: {error}")
    print(json.dumps(measured) if options.time else options.out)


if __name__ == "__main__":
    main()
