"""``inspect`` and ``convert --target-layout`` of a repository: as of the same files here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from quantrecipe.checkpoint.hub.errors import HubError
from quantrecipe.cli.convert import convert as convert_command
from quantrecipe.cli.inspect import inspect as inspect_command
from quantrecipe.converter import convert, plan
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.validation import load_lock
from tests.converter.test_hub_convert import checkpoint, made, recipe
from tests.support.hub_client import hub as hub
from tests.support.hub_server import HubServer

REPO = "o/n"


def run(command: Any, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def without_place(found: Any, *places: object) -> Any:
    """What a report says, whatever it is a report of."""
    text = json.dumps(found)
    for place in places:
        text = text.replace(str(place), "PLACE")
    return json.loads(text)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An FP8 checkpoint of two parts, and INT8 of the same beside it with its lock."""
    root = tmp_path / "root"
    checkpoint(root / "fp8")
    convert(made(recipe()), root / "fp8", root / "int8")
    return root


@pytest.mark.parametrize("folder", ["fp8", "int8", "fp8/transformer"])
def test_a_repository_is_reported_like_its_files(hub: HubServer, here: Path, folder: str) -> None:
    commit = hub.add(REPO, here)
    local = run(inspect_command, here / folder, "--json")
    hub.forget()
    there = run(inspect_command, f"hf://{REPO}/{folder}", "--json")
    assert there.exit_code == local.exit_code == 0, there.output
    place = f"hf://{REPO}@{commit}"
    assert without_place(json.loads(there.stdout), place) == without_place(
        json.loads(local.stdout), here
    )
    whole = sum(file.stat().st_size for file in (here / folder).rglob("*") if file.is_file())
    assert hub.sent < whole


def test_a_draft_names_the_repository(hub: HubServer, here: Path, tmp_path: Path) -> None:
    commit = hub.add(REPO, here)
    draft = tmp_path / "draft.json"
    result = run(inspect_command, f"hf://{REPO}/fp8", "--emit-recipe", draft)
    assert result.exit_code == 0, result.output
    source = json.loads(draft.read_text("utf-8"))["source"]
    assert (source["repo"], source["revision"]) == (REPO, commit)
    assert set(source["parts"].values()) == {"fp8/transformer", "fp8/unconditional_transformer"}
    assert plan(draft).repository is not None


@pytest.mark.parametrize("layout", ["comfyui", "quantrecipe"])
def test_it_is_carried_over_as_from_here(
    hub: HubServer, here: Path, tmp_path: Path, layout: str
) -> None:
    commit = hub.add(REPO, here)
    options = ["--target-layout", layout, "--lossless-only"]
    local = run(convert_command, *options, here / "int8", "--out", tmp_path / "local")
    assert local.exit_code == 0, local.output
    there = run(convert_command, *options, f"hf://{REPO}/int8", "--out", tmp_path / "there")
    assert there.exit_code == 0, there.output
    locks = [load_lock(tmp_path / name / "recipe.lock.json") for name in ("local", "there")]
    assert locks[0].outputs == locks[1].outputs
    read_from = locks[1].repository
    assert read_from is not None
    assert (read_from.repo, read_from.commit, read_from.folder) == (REPO, commit, "int8")


def test_what_is_not_there_is_said(hub: HubServer, here: Path) -> None:
    hub.add(REPO, here)
    missing = run(inspect_command, f"hf://{REPO}/nothing")
    assert isinstance(missing.exception, InvalidInput)
    nobody = run(inspect_command, "hf://nobody/nothing")
    assert isinstance(nobody.exception, InvalidInput)
    assert nobody.exception.problems[0].kind == "no-repository"
    hub.repositories[REPO].gated = True
    gated = run(inspect_command, f"hf://{REPO}/fp8")
    assert isinstance(gated.exception, HubError)
    assert gated.exception.kind == "gated"
