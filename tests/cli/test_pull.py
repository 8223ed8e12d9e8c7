"""``pull``: what is fetched, what is not, and what is said about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save

from quantrecipe.checkpoint.hub.errors import HubError
from quantrecipe.cli.pull import pull
from quantrecipe.schema.problems import InvalidInput, OutputError
from tests.support.hub_server import Fault, HubServer

WEIGHTS = save({"l.weight": np.arange(4000, dtype=np.float32).reshape(4, 1000)})
OTHERS = save({"l.weight": np.arange(4000, 8000, dtype=np.float32).reshape(4, 1000)})
LAST = "unconditional_transformer/diffusion_pytorch_model.safetensors"
SMALL = save({"l.weight": np.ones((2, 2), np.float32)})
INDEX = json.dumps({"weight_map": {"l.weight": "model-00001-of-00001.safetensors"}}).encode()
PIPELINE = {
    "_class_name": "P",
    "transformer": ["diffusers", "T"],
    "vae": ["diffusers", "V"],
    "text_encoder": ["transformers", "E"],
    "tokenizer": ["transformers", "K"],
    "scheduler": ["diffusers", "S"],
    "safety_checker": [None, None],
    "old": ["transformers", "O"],
}
FILES = {
    "README.md": b"# hello",
    "LICENSE.md": b"free",
    "sample.png": b"\x89PNG",
    "model_index.json": json.dumps(PIPELINE).encode(),
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": WEIGHTS,
    "unconditional_transformer/config.json": b"{}",
    LAST: OTHERS,
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": SMALL,
    "vae/diffusion_pytorch_model.fp16.safetensors": SMALL,
    "vae/diffusion_pytorch_model.bin": b"pickled",
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors.index.json": INDEX,
    "text_encoder/model-00001-of-00001.safetensors": SMALL,
    "tokenizer/tokenizer.json": b"{}",
    "tokenizer/tokenizer.model": b"\0",
    "tokenizer/run.py": b"raise SystemExit",
    "scheduler/scheduler_config.json": b"{}",
    "old/pytorch_model.bin": b"pickled",
}
BOTH = {
    f"{folder}/{name}"
    for folder in ("transformer", "unconditional_transformer")
    for name in ("config.json", "diffusion_pytorch_model.safetensors")
}
AROUND = {
    "LICENSE.md",
    "model_index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.json",
    "text_encoder/model-00001-of-00001.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer.model",
    "scheduler/scheduler_config.json",
}


class Pulled(NamedTuple):
    document: dict[str, Any]
    files: set[str]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(pull, arguments, catch_exceptions=False)


def pulled(*arguments: str) -> Pulled:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    folder = Path(document["folder"])
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return Pulled(document, {path for path in there if not path.startswith(".cache/")})


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.json"
    parts = {"conditional": "transformer", "unconditional": "unconditional_transformer"}
    weight = {"format": "int8", "granularity": "channel", "scale_dtype": "float32"}
    document = {
        "kind": "recipe",
        "version": 1,
        "name": "p",
        "source": {"layout": "plain", "repo": "o/n", "revision": "main", "parts": parts},
        "schemes": {"w8": {"weight": {**weight, "quantizer": {"kind": "absmax"}}}},
        "rules": [{"modules": ["**"], "scheme": "w8"}],
        "target": {"layout": "transformerlab"},
    }
    path.write_text(json.dumps(document))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["{recipe}"], BOTH),
        (["{recipe}", "--parts", "conditional"], {path for path in BOTH if path[0] == "t"}),
        (["{recipe}", "--pipeline"], BOTH | AROUND),
        (["hf://o/n@main/vae"], {path for path in AROUND if path.startswith("vae/")}),
        (["hf://o/n", "--parts", "transformer"], {path for path in BOTH if path[0] == "t"}),
        (
            ["hf://o/n/text_encoder/model-00001-of-00001.safetensors"],
            {path for path in AROUND if path.startswith("text_encoder/")},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("out", [False, True])
def test_what_is_fetched(
    hub: HubServer, tmp_path: Path, recipe: str, arguments: list[str], files: set[str], out: bool
) -> None:
    commit = hub.add("o/n", FILES)
    given = [argument.format(recipe=recipe) for argument in arguments]
    found = pulled(*given, *(["--out", str(tmp_path / "out")] if out else []))
    assert found.files == files
    assert {file["path"] for file in found.document["files"]} == files
    assert found.document["bytes"] == sum(len(FILES[path]) for path in files)
    assert found.document["repository"]["commit"] == commit
    for path in files:
        assert (Path(found.document["folder"]) / path).read_bytes() == FILES[path]


def test_a_folder_with_all_weights_of_a_repository(hub: HubServer) -> None:
    hub.add("o/n", FILES)
    found = pulled("hf://o/n").files
    weights = {path for path in found if path.endswith(".safetensors")}
    assert weights == {
        path for path in FILES if path.endswith(".safetensors") and ".fp16." not in path
    }


def test_what_is_here_is_not_fetched_again(hub: HubServer, recipe: str) -> None:
    hub.add("o/n", FILES)
    pulled(recipe, "--parts", "conditional")
    hub.forget()
    listed = run(recipe, "--dry-run")
    assert "here" in listed.stdout
    assert "16.1 KB of it is here already" in listed.stdout
    again = pulled(recipe).document
    assert again["fetched"] == len(WEIGHTS) + 2
    assert not [seen for seen in hub.requests if "/transformer/diff" in seen.path]


def test_a_dry_run_fetches_headers_only(hub: HubServer, recipe: str) -> None:
    hub.add("o/n", FILES)
    done = run(recipe, "--dry-run")
    assert done.exit_code == 0
    assert "unconditional_transformer/diffusion_pytorch_model.safetensors" in done.stdout
    assert "4 files, 32.2 KB" in done.stdout
    assert hub.sent < 1000


def test_an_interrupted_pull_goes_on(
    hub: HubServer, tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("o/n", FILES)
    run(recipe, "--dry-run")
    path = f"/blobs/{hub.repositories['o/n'].files[LAST].sha256}"
    headers = sum(seen.path == path for seen in hub.requests)
    hub.faults = [Fault(path, "GET", times=99, skip=headers, drop_after=5_000)]
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(HubError) as caught:
        run(recipe, "--out", str(tmp_path / "out"))
    assert caught.value.kind == "no-connection"
    hub.faults = []
    hub.forget()
    assert pulled(recipe, "--out", str(tmp_path / "out")).files == BOTH
    fetched = [seen for seen in hub.requests if "/blobs/" in seen.path and seen.sent > 1000]
    assert [seen.path for seen in fetched] == [path]


@pytest.mark.parametrize("pipeline", [False, True])
def test_offline_says_whether_all_is_here(hub: HubServer, recipe: str, pipeline: bool) -> None:
    hub.add("o/n", FILES)
    more = ["--pipeline"] if pipeline else []
    with pytest.raises(HubError, match="quantrecipe pull") as caught:
        run(recipe, "--offline")
    assert caught.value.kind == "offline"
    pulled(recipe, "--parts", "conditional")
    with pytest.raises(InvalidInput, match="not in the Hub's cache"):
        run(recipe, *more, "--offline")
    fetched = pulled(recipe, *more)
    hub.forget()
    assert pulled(recipe, *more, "--offline").files == fetched.files
    assert not hub.requests


def test_weights_in_no_safe_container_are_named(hub: HubServer, recipe: str) -> None:
    hub.add("o/n", FILES)
    done = run(recipe, "--pipeline", "--dry-run")
    assert "warning: old: only pytorch_model.bin" in done.stderr


def test_no_room_is_said_before_anything_is_fetched(
    hub: HubServer, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("o/n", FILES)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="the disk is full: 32,164") as caught:
        run(recipe)
    assert "--out" in str(caught.value)
    assert hub.sent < 1000


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["{recipe}", "--parts", "conditionl"], "unknown-part"),
        (["hf://o/n/vae", "--pipeline"], "no-pipeline"),
        (["hf://o/n@nothing"], "no-revision"),
        (["hf://o/nothing"], "no-repository"),
        (["hf://o/n/nothing"], "missing-source"),
        (["hf://o"], "bad-address"),
    ],
)
def test_what_is_refused(hub: HubServer, recipe: str, arguments: list[str], kind: str) -> None:
    hub.add("o/n", FILES)
    done = run(*(argument.format(recipe=recipe) for argument in arguments), "--json")
    assert done.exit_code == 1, done.output
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem["kind"] == kind
    assert problem["hint"]


def test_a_recipe_without_a_repository(recipe: str) -> None:
    document = json.loads(Path(recipe).read_text())
    del document["source"]["repo"], document["source"]["revision"]
    Path(recipe).write_text(json.dumps(document))
    done = run(recipe, "--json")
    assert json.loads(done.stdout)["problems"][0]["kind"] == "no-source"
