"""A converted checkpoint with its published programs, run where this package is not."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from quantrecipe.publishing.scripts import pipeline_script
from tests.converter.making import Json, parsed, recipe
from tests.loaders.converted import TOKEN as EACH_TOKEN
from tests.loaders.converted import library
from tests.publishing.making import program, run
from tests.publishing.pipelines import ideogram, z_image
from tests.publishing.using_script import Job, Outcome
from tests.support.hub_client import environment, serving
from tests.support.hub_server import TOKEN, HubServer

pytestmark = pytest.mark.xdist_group("diffusers")

DRIVER = Path(__file__).with_name("using_script.py")
PARTS = {"conditional": "transformer", "unconditional": "unconditional_transformer"}
FILE = "diffusion_pytorch_model.safetensors"
BRANCH = "Ideogram4Transformer2DModel"
GATED = "base/gated"


@dataclass(frozen=True)
class Published:
    """A folder that is published.

    Attributes:
        base: the pipeline whose components are converted.
        parts: of it, and the folders that they are in.
        target: of the recipe.
        activation: how inputs are quantized.
    """

    base: str
    parts: dict[str, str]
    target: Json
    activation: Json | None = field(default_factory=lambda: EACH_TOKEN)


FOLDERS: Json = {
    "layout": "quantrecipe",
    "parts": {part: f"{name}/{FILE}" for part, name in PARTS.items()},
}
PUBLISHED = {
    "folders": Published("ideogram", PARTS, FOLDERS),
    "one file": Published(
        "ideogram",
        PARTS,
        {"layout": "transformerlab", "file": "both.safetensors", "names": "ideogram4-original"},
    ),
    "another": Published(
        "z-image",
        {"denoiser": "transformer", "text": "text_encoder"},
        {
            "layout": "quantrecipe",
            "parts": {"denoiser": f"transformer/{FILE}", "text": "text_encoder/model.safetensors"},
        },
        activation=None,
    ),
    "gated": Published("gated", PARTS, FOLDERS),
}
RUN = ("folders", "one file", "another")
CALL = ["--height", "32", "--width", "32", "--max-tokens", "24", "--steps", "4"]
"""Arguments that make for a small image."""


@dataclass
class World:
    """What was converted, published, and run.

    Attributes:
        bases: the folders that the original pipelines were saved into, by their names.
        pipelines: those.
        outs: converted folders, with their programs, by the names of ``PUBLISHED``.
        outcomes: of the runs, by their names; ``images`` likewise.
    """

    bases: dict[str, Path]
    pipelines: dict[str, Any]
    outs: dict[str, Path]
    outcomes: dict[str, Outcome]
    images: dict[str, Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("usage")
    bases = {"ideogram": folder / "ideogram", "z-image": folder / "z-image"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries
        diffusers = library("diffusers")
        makers = {"ideogram": ideogram, "z-image": z_image}
        pipelines = {name: makers[name](base, diffusers) for name, base in bases.items()}
    with pytest.MonkeyPatch.context() as patch, serving(folder / "hf", patch) as server:
        for name, base in bases.items():
            server.add(f"base/{name}", files_of(base))
        server.add(GATED, files_of(bases["ideogram"]), gated=True, granted={TOKEN})
        outs = {name: published(folder, name) for name in PUBLISHED}
        server.repositories[GATED].granted.clear()
        world = World(bases, pipelines, outs, {}, {})
        run_all(world, folder, server)
        yield world


def files_of(folder: Path) -> dict[str, bytes]:
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    return files | {"README.md": b"---\nlicense: apache-2.0\n---\n"}


def published(folder: Path, name: str) -> Path:
    """Convert components of a pipeline, and publish them."""
    made = PUBLISHED[name]
    document = recipe(target_fields=made.target)
    document["source"] = {"layout": "plain", "parts": made.parts}
    if made.activation is not None:
        document["schemes"]["all"]["activation"] = made.activation
    modules = "layers.*.{attention,feed_forward,self_attn,mlp}.**"
    document["rules"] = [{"modules": [modules], "scheme": "all"}]
    out = folder / name.replace(" ", "-")
    convert(parsed(document), f"hf://base/{made.base}", out)
    result = run(out)
    assert result.exit_code == 0, result.output
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
    for out in RUN:
        add(out, out)
        add(f"{out}, offloaded", out, "--offload", "--time")
    add("other prompt", "folders", prompt="dogs")
    add("other seed", "folders", "--seed", "1")
    add("constant", "folders", "--guidance", "7")
    add("bfloat16", "folders", "--dtype", "bfloat16", "--deps", str(folder / "deps"))
    add("crooked", "folders", "--height", "30")
    add("nowhere", "folders", "--out", str(folder / "no" / "image.png"))
    add("no such device", "folders", "--device", "cuda:99")
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


@pytest.mark.parametrize("out", ["folders", "another"])
def test_the_image_is_that_of_the_loaded_model(world: World, tmp_path: Path, out: str) -> None:
    made = PUBLISHED[out]
    pipeline = world.pipelines[made.base]
    for part, name in made.parts.items():
        load_model(getattr(pipeline, name), world.outs[out], part=part)
    more = {"guidance_schedule": [7.0] * 4} if made.base == "ideogram" else {}
    world.images["expected"] = path = tmp_path / "expected.png"
    pipeline(
        "a cat",
        height=32,
        width=32,
        num_inference_steps=4,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(0),
        **more,
    ).images[0].save(path)
    assert world.outcomes[out]["ended"] is None
    assert apart(world, out, "expected") <= 1
    assert pixels(path).std() > 20


def test_the_card_says_how_it_is_run(world: World) -> None:
    card = (world.outs["folders"] / "README.md").read_text("utf-8")
    assert "pip install torch safetensors diffusers transformers\npython download_deps.py" in card
    assert 'pipeline = assemble(torch.device("cuda"))' in card


def test_split_and_renamed_modules_give_the_same_image(world: World) -> None:
    assert apart(world, "folders", "one file") == 0


@pytest.mark.parametrize("out", RUN)
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
    assert ended["crooked"] is not None
    assert ended["crooked"].startswith("error: `height` (30) and `width` (32) must both be")
    assert ended["nowhere"] == ended["no such device"] == "2"  # the command line's own refusals
    assert ended["gated"] is not None
    assert ended["gated"].startswith(f"error: {GATED} is gated: accept its terms at http://127.")
    assert not world.images["gated"].exists()


@pytest.fixture
def usage(world: World, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A published program in this process, where the package is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries
        return program(world.outs["folders"], monkeypatch)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_blocks_are_what_is_compiled(world: World, usage: Any) -> None:
    branch, other = world.pipelines["ideogram"].transformer, nn.Linear(2, 2)
    usage.compile_blocks(branch)
    usage.compile_blocks(other)
    compiled = {
        type(module).__name__
        for module in [*branch.modules(), other]
        if module._compiled_call_impl is not None
    }
    for module in [*branch.modules(), other]:
        module._compiled_call_impl = None
    assert compiled == {"Ideogram4TransformerBlock", "Linear"}


def test_the_other_kernels_give_the_same_image(
    world: World, usage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.images["by kernels"] = path = tmp_path / "by kernels.png"
    more = ["--out", str(path), "--fast", "--device", "cpu", "--dtype", "float32"]
    arguments = ["usage.py", "a cat", *CALL, *more, "--deps", str(world.bases["ideogram"])]
    monkeypatch.setattr(sys, "argv", arguments)
    usage.main()
    assert apart(world, "folders", "by kernels") <= 1


def test_what_a_pipeline_does_not_know_is_refused(
    usage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pipeline:
        def __call__(self, prompt: str, num_inference_steps: int) -> None: ...

    monkeypatch.setattr(sys, "argv", ["usage.py", "a cat", "--steps", "3"])
    given = usage.arguments(Pipeline, usage.parse())
    assert given.keys() == {"num_inference_steps", "generator"}
    monkeypatch.setattr(sys, "argv", ["usage.py", "a cat", "--guidance", "3", "--height", "8"])
    with pytest.raises(usage.UsageError, match=r"Pipeline has no guidance_scale, height$"):
        usage.arguments(Pipeline, usage.parse())


def test_weights_are_on_the_device_in_their_stage_only(usage: Any) -> None:
    class Pipeline:
        def __init__(self) -> None:
            vae: Any = nn.Linear(2, 2)
            vae.decode = self.look
            self.vae = vae
            codes = nn.Module()
            codes.register_buffer("codes", torch.ones(2, dtype=torch.int8))
            tied = nn.Linear(2, 2)
            tied.again = tied.weight
            self.components = {
                "text_encoder": tied,
                "scheduler": None,
                "transformer": codes,
                "transformer_2": nn.Linear(2, 2),
                "vae": self.vae,
            }
            self.seen: list[set[str]] = []

        def look(self, *_: object) -> None:
            """Which components are on the device."""
            modules = {name: each for name, each in self.components.items() if each}
            tensors = {n: [*m.parameters(), *m.buffers()] for n, m in modules.items()}
            there = {n: {t.dtype == torch.float64 for t in each} for n, each in tensors.items()}
            assert all(len(each) == 1 for each in there.values())
            self.seen.append({n for n, each in there.items() if each == {True}})

        def __call__(self) -> None: ...

        encode_prompt = look

    pipeline: Any = Pipeline()
    before = {t: t.data_ptr() for m in pipeline.components.values() if m for t in m.parameters()}
    stages = usage.Stages(pipeline, torch.device("cpu"), True)
    # In place of a device, a dtype: what was moved is known by it.
    stages.device, stages.now = torch.float64, lambda: 0.0
    for _ in range(2):
        pipeline.encode_prompt("a cat")
        for name in ("transformer", "transformer_2", "transformer"):
            for hook in pipeline.components[name]._forward_pre_hooks.values():
                hook()
            pipeline.look()
        pipeline.vae.decode()
    both = {"transformer", "transformer_2"}
    assert pipeline.seen == 2 * [{"text_encoder"}, both, both, both, {"vae"}]
    stages.enter(None)
    assert {tensor: tensor.data_ptr() for tensor in before} == before
    assert pipeline._execution_device == torch.device("cpu")


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
