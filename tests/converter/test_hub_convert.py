"""Converting straight from a repository: the same bytes as from files, and no more fetched."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save_file

from quantrecipe.checkpoint import reading, staging
from quantrecipe.checkpoint.hub.errors import HubError
from quantrecipe.checkpoint.hub.read_ahead import ReadAhead
from quantrecipe.cli.convert import convert as command
from quantrecipe.converter import convert, plan
from quantrecipe.schema.lock import Lock
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.validation import parse_recipe
from quantrecipe.testing.strategies import layout_of_everything
from tests.support.hub_client import environment
from tests.support.hub_server import Fault, HubServer

REPO = "o/n"
MOST_BYTES, REQUEST_BYTES = 200_000, 30_000
PARTS = {"conditional": "transformer", "unconditional": "unconditional_transformer"}


def checkpoint(root: Path, size: int = 256) -> Path:
    """A pipeline with two branches in fp8 with scales, as the FP8 base checkpoint is laid out."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for folder in PARTS.values():
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(3):
            for name in ("attention.qkv", "feed_forward.w2"):
                weight = random(size, size).to(torch.float8_e4m3fn)
                tensors[f"layers.{layer}.{name}.weight"] = weight
                tensors[f"layers.{layer}.{name}.weight_scale"] = random(size).abs() + 0.1
            tensors[f"layers.{layer}.norm.weight"] = random(size).to(torch.bfloat16)
        tensors["embed.bias"] = random(size).to(torch.bfloat16)
        (root / folder).mkdir(parents=True)
        path = root / folder / "diffusion_pytorch_model.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        (root / folder / "config.json").write_text('{"_class_name": "X", "size": 256}')
    (root / "README.md").write_text("# FP8\n")
    return root


def recipe(**source: Any) -> dict[str, Any]:
    weight = {"format": "int8", "granularity": "channel", "scale_dtype": "float32"}
    return {
        "kind": "recipe",
        "version": 1,
        "name": "hub",
        "source": {"layout": "fp8-scaled", "parts": PARTS, **source},
        "schemes": {"w8": {"weight": {**weight, "quantizer": {"kind": "absmax"}}}},
        "rules": [{"modules": ["layers.**"], "scheme": "w8"}],
        "target": {
            "layout": "quantrecipe",
            "parts": {part: f"{folder}/model.safetensors" for part, folder in PARTS.items()},
        },
    }


def made(document: dict[str, Any]) -> Recipe:
    return parse_recipe(json.dumps(document))


def needed(root: Path) -> int:
    """Bytes that have to be fetched: headers, tensors, configs."""
    return sum(
        path.stat().st_size for path in root.rglob("*") if path.suffix in (".safetensors", ".json")
    )


def outputs(out: Path) -> dict[str, bytes]:
    """Every file that was written, but for the lock, which says where the source was."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in ("recipe.lock.json", "recipe.json")
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "source")


@pytest.fixture
def expected(tmp_path: Path, source: Path) -> dict[str, bytes]:
    convert(made(recipe(repo=REPO)), source, tmp_path / "expected")
    return outputs(tmp_path / "expected")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small requests and little room; the bytes held, each time that some are added."""
    held: list[int] = []

    class Small(ReadAhead):
        def __init__(self) -> None:
            super().__init__(MOST_BYTES, 4, request_bytes=REQUEST_BYTES)

        def _begin(self, block: Any) -> None:
            super()._begin(block)
            held.append(self._held)

    monkeypatch.setattr(reading, "ReadAhead", Small)
    return held


def test_a_repository_is_converted_as_the_same_files_are(
    hub: HubServer, tmp_path: Path, source: Path, expected: dict[str, bytes]
) -> None:
    commit = hub.add(REPO, source)
    hub.repositories[REPO].refs["v1"] = commit
    hub.commit(REPO, {"README.md": b"changed later"})
    done = convert(made(recipe(repo=REPO)), f"hf://{REPO}@v1", tmp_path / "out", jobs=3)
    assert outputs(tmp_path / "out") == expected
    assert hub.sent <= 1.02 * needed(source)
    assert done.lock.repository is not None
    assert done.lock.repository.to_json_value() == {
        "repo": REPO,
        "revision": "v1",
        "commit": commit,
    }
    files = hub.repositories[REPO].files
    assert [(file.path, file.etag, file.sha256) for file in done.lock.source] == [
        (path, files[path].sha256, files[path].sha256)
        for folder in PARTS.values()
        for path in [f"{folder}/diffusion_pytorch_model.safetensors"]
    ]
    pinned = [seen for seen in hub.requests if "/resolve/" in seen.path]
    assert pinned
    assert all(f"/resolve/{commit}/" in seen.path for seen in pinned)
    text = (tmp_path / "out" / "recipe.lock.json").read_text()
    assert Lock.model_validate_json(text) == done.lock


def test_no_copy_of_the_source_is_kept(hub: HubServer, tmp_path: Path, source: Path) -> None:
    hub.add(REPO, source)
    convert(made(recipe()), f"hf://{REPO}", tmp_path / "out")
    kept = [path for path in (tmp_path / "hf-home").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 10_000
    # Beside what is the whole test's, nothing is left.
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "source", "hf-home"}


def test_fifty_lost_connections_change_nothing(
    hub: HubServer, tmp_path: Path, source: Path, expected: dict[str, bytes]
) -> None:
    hub.add(REPO, source)
    hub.faults = [
        Fault("/blobs/", "GET", times=50, drop_after=9_000),
        Fault("/resolve/", "GET", times=5, skip=8, status=503),
    ]
    convert(made(recipe(repo=REPO)), None, tmp_path / "out", jobs=2)
    assert [fault.times for fault in hub.faults] == [0, 0]
    assert outputs(tmp_path / "out") == expected
    # What came before a connection was lost is not fetched again.
    assert hub.sent <= 1.02 * needed(source)


def test_an_interrupted_conversion_fetches_only_what_is_left(
    hub: HubServer,
    tmp_path: Path,
    source: Path,
    expected: dict[str, bytes],
    small: list[int],
) -> None:
    hub.add(REPO, source)
    # Headers take four requests.
    hub.faults = [Fault("/blobs/", "GET", times=999, skip=20, drop_after=0)]
    job = made(recipe(repo=REPO))
    with pytest.raises(HubError, match="cannot be reached") as caught:
        convert(job, None, tmp_path / "out", jobs=1)
    assert caught.value.kind == "no-connection"
    assert (tmp_path / f"out{staging.SUFFIX}").is_dir()
    hub.faults = []
    hub.forget()
    said: list[str] = []
    convert(job, None, tmp_path / "out", notice=said.append)
    assert outputs(tmp_path / "out") == expected
    assert any(text.startswith("going on") for text in said)
    left = hub.sent
    hub.forget()
    convert(job, None, tmp_path / "again")
    assert left < hub.sent * 0.95


def test_another_commit_is_another_source(
    hub: HubServer, tmp_path: Path, source: Path, small: list[int]
) -> None:
    hub.add(REPO, source)
    hub.faults = [Fault("/blobs/", "GET", times=999, skip=20, drop_after=0)]
    job = made(recipe(repo=REPO))
    with pytest.raises(HubError):
        convert(job, None, tmp_path / "out", jobs=1)
    hub.faults = []
    hub.commit(REPO, {"README.md": b"later"})
    said: list[str] = []
    done = convert(job, None, tmp_path / "out", notice=said.append)
    assert done.lock.repository is not None
    assert done.lock.repository.commit == hub.repositories[REPO].refs["main"]
    assert "starting over: the source has changed" in said


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_scale_for_all_of_a_weight_fetches_it_once(
    hub: HubServer, tmp_path: Path, source: Path, jobs: int
) -> None:
    hub.add(REPO, source)
    document = recipe(repo=REPO)
    document["schemes"]["w8"]["weight"]["granularity"] = "tensor"
    document["target"]["layout"] = layout_of_everything().to_json_value()
    convert(made(document), None, tmp_path / "out", jobs=jobs)
    assert hub.sent <= 1.02 * needed(source)


def test_processes_read_for_themselves(
    hub: HubServer, tmp_path: Path, source: Path, expected: dict[str, bytes]
) -> None:
    hub.add(REPO, source)
    before = dict(os.environ)
    os.environ.update(environment(hub, tmp_path / "theirs"))
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            convert(made(recipe(repo=REPO)), None, tmp_path / "out", executor=pool)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert outputs(tmp_path / "out") == expected
    assert hub.sent <= 1.02 * needed(source)


def test_what_is_in_the_cache_is_not_fetched(
    hub: HubServer, tmp_path: Path, source: Path, expected: dict[str, bytes]
) -> None:
    hub.add(REPO, source)
    snapshot_download(REPO, allow_patterns="*transformer/*", endpoint=hub.url)
    hub.forget()
    done = convert(made(recipe(repo=REPO)), None, tmp_path / "out")
    assert outputs(tmp_path / "out") == expected
    assert hub.sent == 0
    assert all(file.etag is None and file.sha256 for file in done.lock.source)
    assert done.lock.repository is not None


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_the_cache_is_the_repository(
    hub: HubServer,
    tmp_path: Path,
    source: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    commit = hub.add(REPO, source)
    job = made(recipe(repo=REPO))
    snapshot_download(REPO, endpoint=hub.url)
    hub.forget()
    if how == "environment":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = convert(job, None, tmp_path / "out", offline=how == "argument")
    assert not hub.requests
    assert outputs(tmp_path / "out") == expected
    assert done.lock.repository is not None
    assert done.lock.repository.commit == commit


def test_offline_without_a_cache_says_what_to_do(hub: HubServer, source: Path) -> None:
    hub.add(REPO, source)
    job = made(recipe(repo=REPO))
    with pytest.raises(HubError, match="quantrecipe pull") as caught:
        plan(job, offline=True)
    assert caught.value.kind == "offline"
    snapshot_download(REPO, allow_patterns="transformer/*", endpoint=hub.url)
    with pytest.raises(InvalidInput) as refused:
        plan(job, offline=True)
    (problem,) = refused.value.problems
    assert problem.kind == "missing-part"
    assert "quantrecipe pull" in str(problem)
    assert not [seen for seen in hub.requests if "unconditional" in seen.path]


def test_a_recipe_that_names_a_repository_that_is_not_there(hub: HubServer, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(repo="o/other", revision="v1"), indent=1))
    with pytest.raises(InvalidInput) as caught:
        plan(path)
    (problem,) = caught.value.problems
    assert problem.kind == "no-repository"
    assert (problem.file, problem.line, problem.pointer) == (str(path), 11, "/source/repo")
    assert problem.message.startswith("hf://o/other@v1: ")
    hub.add("o/other", {})
    with pytest.raises(InvalidInput) as caught:
        plan(path)
    (problem,) = caught.value.problems
    assert problem.kind == "no-revision"


def test_memory_stays_bounded(
    hub: HubServer, tmp_path: Path, source: Path, expected: dict[str, bytes], small: list[int]
) -> None:
    """Small blocks, small requests and little room: many at once, and still every byte once."""
    hub.add(REPO, source)
    convert(made(recipe(repo=REPO)), None, tmp_path / "out", jobs=2, block_bytes=10_000)
    assert outputs(tmp_path / "out") == expected
    assert max(small) <= MOST_BYTES + 2 * REQUEST_BYTES
    assert hub.sent <= 1.02 * needed(source)


def test_the_command_takes_an_address(
    hub: HubServer, tmp_path: Path, source: Path, expected: dict[str, bytes]
) -> None:
    hub.add(REPO, source)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(repo=REPO)))
    call = ["--recipe", str(path), f"hf://{REPO}@main", "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(command, call)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["recipe"] == "hub"
    assert outputs(tmp_path / "out") == expected
    planned = CliRunner().invoke(command, [*call[:3], "--dry-run"])
    assert planned.exit_code == 0, planned.output


def test_the_command_says_what_is_wrong(hub: HubServer, tmp_path: Path, source: Path) -> None:
    hub.add(REPO, source, gated=True)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe()))
    call = ["--recipe", str(path), f"hf://{REPO}", "--out", str(tmp_path / "out")]
    with pytest.raises(HubError, match="Accept them at"):
        CliRunner().invoke(command, call, catch_exceptions=False)
    done = CliRunner().invoke(command, [*call, "--json"])
    assert done.exit_code == 3
    assert json.loads(done.stdout)["problems"][0]["kind"] == "gated"
    assert not (tmp_path / "out").exists()
