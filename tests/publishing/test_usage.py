"""A converted checkpoint with its published programs, run where this package is not."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantrecipe.converter import convert
from quantrecipe.loaders import load_model
from quantrecipe.publishing.facts import Needed
from quantrecipe.publishing.scripts import Component, download_script, pipeline_script
from quantrecipe.schema.registry import resolve_names
from tests.converter.making import Json, parsed, recipe
from tests.loaders.converted import TOKEN, library
from tests.publishing.pipelines import ideogram
from tests.publishing.using_script import Job, Outcome
from tests.support.hub_client import environment
from tests.support.hub_server import HubServer

pytestmark = pytest.mark.xdist_group("diffusers")

DRIVER = Path(__file__).with_name("using_script.py")
REPO = "base/ideogram"
PARTS = {"conditional": "transformer", "unconditional": "unconditional_transformer"}
FILE = "diffusion_pytorch_model.safetensors"
CLASS = "Ideogram4Transformer2DModel"
TARGETS: dict[str, Json] = {
    "folders": {
        "layout": "quantrecipe",
        "parts": {part: f"{name}/{FILE}" for part, name in PARTS.items()},
    },
    "one file": {
        "layout": "transformerlab",
        "file": "both.safetensors",
        "names": "ideogram4-original",
    },
}
CALL = ["--height", "32", "--width", "32", "--max-tokens", "24", "--steps", "4"]
"""Arguments that make for a small image."""


@dataclass
class World:
    """What was converted, published, and run.

    Attributes:
        pipeline: the original one.
        outs: converted folders, with their programs, by the names of ``TARGETS``.
        outcomes: of the runs, by their names; ``images`` likewise.
    """

    pipeline: Any
    outs: dict[str, Path]
    needed: Needed
    outcomes: dict[str, Outcome]
    images: dict[str, Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("usage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries
        diffusers = library("diffusers")
        pipeline = ideogram(folder / "base", diffusers)
    base = folder / "base"
    files = {
        path.relative_to(base).as_posix(): path.read_bytes()
        for path in base.rglob("*")
        if path.is_file()
    }
    weights = {f"{name}/{FILE}" for name in PARTS.values()}
    sizes = {path: len(content) for path, content in files.items() if path not in weights}
    with HubServer() as server:
        commit = server.add(REPO, files)
        needed = Needed(REPO, commit, False, sizes)
        outs = {name: published(folder, name, needed) for name in TARGETS}
        world = World(pipeline, outs, needed, {}, {})
        run_all(world, folder, server)
        yield world


def published(folder: Path, name: str, needed: Needed) -> Path:
    """Convert both branches, and put the programs beside them."""
    document = recipe(target_fields={**TARGETS[name], "emit_loader": True})
    document["source"] = {"layout": "plain", "parts": PARTS}
    document["schemes"]["all"]["activation"] = TOKEN
    document["rules"] = [{"modules": ["layers.*.{attention,feed_forward}.**"], "scheme": "all"}]
    out = convert(parsed(document), folder / "base", folder / name).out
    split = name == "one file"
    components = {
        component: Component(
            part, CLASS, f"{component}/config.json", "dependencies" if split else "here"
        )
        for part, component in PARTS.items()
    }
    names = resolve_names("ideogram4-diffusers") if split else ()
    script = pipeline_script("Ideogram4Pipeline", components, names)
    (out / "usage.py").write_bytes(script)
    (out / "download_deps.py").write_bytes(download_script(needed))
    return out


def run_all(world: World, folder: Path, server: HubServer) -> None:
    """Every run of every test, in one process: importing the libraries takes seconds."""
    jobs: dict[str, Job] = {}

    def add(name: str, out: str, *more: str, prompt: str = "a cat") -> None:
        world.images[name] = folder / f"{name}.png"
        arguments = [prompt, "--out", str(world.images[name]), *CALL, *more]
        jobs[name] = {
            "folder": str(world.outs[out]),
            "program": "usage",
            "arguments": ["--device", "cpu", "--dtype", "float32", *arguments],
        }

    for out in world.outs:
        add(out, out)
        add(f"{out}, offloaded", out, "--offload", "--time")
    add("other prompt", "folders", prompt="dogs")
    add("other seed", "folders", "--seed", "1")
    add("constant", "folders", "--guidance", "7")
    add("bfloat16", "folders", "--dtype", "bfloat16", "--deps", str(folder / "deps"))
    add("fast", "folders", "--fast")
    add("fast, renamed", "one file", "--fast")
    listed = folder / "jobs.json"
    listed.write_text(json.dumps([*jobs.values()]))
    result = subprocess.run(
        [sys.executable, "-I", str(DRIVER), str(listed)],
        env=environment(server, folder / "hf-home"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = json.loads(listed.with_suffix(".done.json").read_text())
    world.outcomes.update(zip(jobs, outcomes, strict=True))


def pixels(path: Path) -> np.ndarray:
    image = library("PIL.Image")
    return np.asarray(image.open(path)).astype(int)


def apart(world: World, one: str, other: str) -> int:
    return int(np.abs(pixels(world.images[one]) - pixels(world.images[other])).max())


def test_the_image_is_that_of_the_loaded_model(world: World, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "expected.png"
    world.images["expected"] = path
    for part, name in PARTS.items():
        load_model(getattr(world.pipeline, name), world.outs["folders"], part=part)
    world.pipeline.set_progress_bar_config(disable=True)
    world.pipeline(
        "a cat",
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_schedule=[7.0] * 4,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(0),
    ).images[0].save(path)
    assert world.outcomes["folders"]["ended"] is None
    assert apart(world, "folders", "expected") <= 1
    assert pixels(path).std() > 20


def test_split_and_renamed_modules_give_the_same_image(world: World) -> None:
    assert apart(world, "folders", "one file") == 0


@pytest.mark.parametrize("out", TARGETS)
def test_one_stage_at_a_time_is_on_the_device(world: World, out: str) -> None:
    assert apart(world, out, f"{out}, offloaded") == 0
    outcome = world.outcomes[f"{out}, offloaded"]
    assert outcome["stages"] == ["encode", "denoise", "decode", None]
    measured = json.loads(outcome["stdout"])
    assert measured["steps"] == 4
    assert measured["peak_memory"] is None
    spent = measured["encode"] + measured["decode"] + measured["step"]
    assert 0 < spent < measured["image"]


def test_what_is_asked_for_is_seen_in_the_image(world: World) -> None:
    for name in ("other prompt", "other seed"):
        assert apart(world, "folders", name) > 20, name
    # Of four steps, none is among the last of the schedule: it is 7 throughout.
    assert apart(world, "folders", "constant") == 0
    assert 0 < apart(world, "folders", "bfloat16") < 100
    assert world.outcomes["folders"]["stdout"] == f"{world.images['folders']}\n"


def test_the_other_kernels_are_asked_for_and_not_there(world: World) -> None:
    ended = world.outcomes["fast"]["ended"]
    assert ended is not None
    assert ended.startswith("error: --fast: install quantrecipe")
    ended = world.outcomes["fast, renamed"]["ended"]
    assert ended == "error: --fast does not rename modules, and this checkpoint needs that"
