"""A converted checkpoint with its published programs, run where this package is not."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

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
REPO, GATED = "base/ideogram", "base/gated"
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
        base: the folder that the original pipeline was saved into.
        pipeline: that one.
        outs: converted folders, with their programs, by the names of ``TARGETS``.
        outcomes: of the runs, by their names; ``images`` likewise.
    """

    base: Path
    pipeline: Any
    outs: dict[str, Path]
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
        outs["gated"] = folder / "gated"
        shutil.copytree(outs["folders"], outs["gated"])
        gated = Needed(GATED, server.add(GATED, files, gated=True), True, sizes)
        (outs["gated"] / "download_deps.py").write_bytes(download_script(gated))
        world = World(base, pipeline, outs, {}, {})
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

    add("gated", "gated")
    for out in TARGETS:
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
        env=os.environ | environment(server, folder / "hf-home"),
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


def test_what_is_not_there_is_said_in_a_line(world: World) -> None:
    ended = {name: outcome["ended"] for name, outcome in world.outcomes.items()}
    assert ended["fast"] is not None
    assert ended["fast"].startswith("error: install quantrecipe, or leave --fast out")
    said = "error: --fast does not rename modules, and this checkpoint needs that"
    assert ended["fast, renamed"] == said
    assert ended["gated"] is not None
    assert ended["gated"].startswith(f"error: {GATED} is gated: accept its terms at http://127.")
    assert not world.images["gated"].exists()


@pytest.fixture
def program(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A published program in this process, where the package is."""
    monkeypatch.syspath_prepend(str(world.outs["folders"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries
        yield importlib.import_module("usage")
    for name in ("usage", "download_deps", "safetensors_loader"):
        sys.modules.pop(name, None)


def test_the_other_kernels_give_the_same_image(
    world: World, program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.images["by kernels"] = path = tmp_path / "by kernels.png"
    more = ["--out", str(path), "--fast", "--device", "cpu", "--dtype", "float32"]
    arguments = ["usage.py", "a cat", *CALL, *more, "--deps", str(world.base)]
    monkeypatch.setattr(sys, "argv", arguments)
    program.main()
    assert apart(world, "folders", "by kernels") <= 1


def test_what_a_pipeline_does_not_know_is_refused(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pipeline:
        def __call__(self, prompt: str, num_inference_steps: int) -> None: ...

    monkeypatch.setattr(sys, "argv", ["usage.py", "a cat", "--steps", "3"])
    given = program.arguments(Pipeline(), program.parse(), None)
    assert given.keys() == {"num_inference_steps", "generator"}
    monkeypatch.setattr(sys, "argv", ["usage.py", "a cat", "--guidance", "3", "--height", "8"])
    with pytest.raises(program.UsageError, match=r"Pipeline has no guidance_scale, height$"):
        program.arguments(Pipeline(), program.parse(), None)


def test_parameters_take_no_memory_and_buffers_are_made(program: Any) -> None:
    register = nn.Module.register_parameter
    with program.parameters_on_meta():
        model: Any = nn.Sequential(nn.Linear(1 << 20, 8, bias=False), nn.BatchNorm1d(8))
        model.tied = nn.Linear(1 << 20, 8, bias=False)
        model.tied.weight = model[0].weight
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model[1].running_var, torch.ones(8))
    assert model.tied.weight is model[0].weight
    assert nn.Module.register_parameter is register


@given(st.lists(st.floats(0, 9), min_size=1, max_size=60), st.integers(1, 200))
def test_a_schedule_is_stretched_evenly(schedule: list[float], steps: int) -> None:
    resampled = published_function("resampled")
    assert resampled(schedule, len(schedule)) == schedule
    places = list(range(len(schedule)))
    found = resampled(places, steps)
    assert len(found) == steps
    assert found == sorted(found)
    # Each value has its share, but for less than a step.
    assert all(abs(found.count(place) - steps / len(places)) <= 1 for place in places)


def published_function(name: str) -> Any:
    """A function of the program, without what that imports."""
    tree = ast.parse(pipeline_script("", {}))
    found = next(one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == name)
    namespace: dict[str, Any] = {}
    exec(f"from __future__ import annotations\n{ast.unparse(found)}", namespace)
    return namespace[name]
