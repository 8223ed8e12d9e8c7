"""``quantrecipe publish``: what lies in a folder afterwards, and what is refused before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants, snapshot_download

from quantrecipe.checkpoint import OutputExists, file_sha256
from quantrecipe.checkpoint.hub.errors import HubError
from quantrecipe.evaluate import verify
from quantrecipe.schema.canonical import document_bytes
from quantrecipe.schema.lock import Lock
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.validation import load_lock
from tests.evaluate.scores.making import compared, one_seed
from tests.evaluate.scores.making import scores as made_up
from tests.publishing.making import BASE, CARD, base_files, converted, run
from tests.support.hub_client import hub as hub
from tests.support.hub_server import HubServer

OWN = '''"""Draws a digit.

    python usage.py "seven" --seed 3
    python usage.py --help
"""
from diffusers.models.transformers import x
'''
VALUES = {"ref": [1.0, 2.5, 3.0], "int8": [1.0, 2.0, 3.5], "nf4": [0.5, 2.0, 3.0]}
ADDED = {"README.md", "LICENSE.md", "usage.py", "safetensors_loader.py"}


def there(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def kinds(error: BaseException | None) -> list[str]:
    assert isinstance(error, InvalidInput)
    return [problem.kind for problem in error.problems]


def lock_of(folder: Path) -> Lock:
    return load_lock(folder / "recipe.lock.json")


def test_a_folder_becomes_a_repository(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out")
    before = there(out)
    result = run(out)
    assert result.exit_code == 0, result.output
    assert there(out) - before == ADDED
    assert result.stdout.splitlines() == [str(out / name) for name in sorted(ADDED)]
    assert (out / "LICENSE.md").read_bytes() == base_files()["LICENSE.md"]
    assert not verify(out).problems
    assert not list(tmp_path.glob("*.partial"))
    again = run(out)
    assert (again.exit_code, again.stdout) == (0, f"{out}: as it was\n")


def front_matter(folder: Path) -> dict[str, Any]:
    data: Any = ModelCard((folder / "README.md").read_text("utf-8")).data
    found: dict[str, Any] = data.to_dict()
    return found


def test_the_card_has_what_the_base_says(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out", target="quantrecipe")
    run(out)
    card = front_matter(out)
    assert card["license"] == "other"
    assert card["license_name"] == "my-own"
    assert card["license_link"] == "LICENSE.md"
    assert card["base_model"] in (BASE, [BASE])
    assert card["base_model_relation"] == "quantized"
    assert card["pipeline_tag"] == "feature-extraction"
    assert card["library_name"] == "my-library"
    assert card["language"] == ["en", "de"]
    assert {"custom", "int8"} <= set(card["tags"])


def test_a_link_into_the_base_stays_whole(hub: HubServer, tmp_path: Path) -> None:
    card = CARD.replace("LICENSE.md", "./legal/terms.md")
    commit = hub.add(BASE, base_files(card=card))
    out = converted(hub, tmp_path / "out")
    run(out)
    assert front_matter(out)["license_link"] == f"{hub.url}/{BASE}/blob/{commit}/legal/terms.md"


def test_nothing_a_user_had_is_replaced(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out")
    (out / "README.md").write_text("mine")
    result = run(out)
    assert isinstance(result.exception, OutputExists)
    assert result.exception.paths == ("README.md",)
    assert (out / "README.md").read_text() == "mine"
    assert "usage.py" not in there(out)
    assert run(out, "--force").exit_code == 0
    assert (out / "README.md").read_text("utf-8").startswith("---\n")


@pytest.mark.parametrize(
    "card",
    [None, "# no front matter\n", "---\nlicense: [mit, apache-2.0]\n---\n"],
    ids=["no card", "no licence", "several"],
)
def test_a_missing_licence_stops_it(hub: HubServer, tmp_path: Path, card: str | None) -> None:
    hub.add(BASE, base_files(card=card))
    out = converted(hub, tmp_path / "out")
    before = there(out)
    result = run(out)
    assert kinds(result.exception) == ["no-license"]
    assert BASE in str(result.exception)
    assert there(out) == before
    assert run(out, "--license", "mit").exit_code == 0
    assert front_matter(out)["license"] == "mit"


def test_a_licence_without_a_word_for_it_needs_a_name(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out")
    assert run(out, "--license", "other").exit_code == 2
    assert run(out, "--license-name", "x").exit_code == 2
    link = "https://example.com/terms"
    given = ["--license", "other", "--license-name", "x", "--license-link", link]
    assert run(out, *given).exit_code == 0


def test_what_is_damaged_is_not_published(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out")
    (out / "config.json").unlink()
    assert kinds(run(out).exception) == ["missing-file"]
    assert kinds(run(tmp_path).exception) == ["no-lock"]


def test_a_base_that_the_lock_contradicts_is_refused(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out")
    assert kinds(run(out, "--base", "owner/another").exception) == ["another-base"]


def test_a_dry_run_shows_all_and_does_nothing(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out")
    before = there(out)
    hub.forget()
    result = run(out, "--dry-run", "--push", "somebody/new")
    assert result.exit_code == 0, result.output
    assert there(out) == before
    assert "somebody/new" not in hub.repositories
    assert {seen.method for seen in hub.requests} <= {"GET", "HEAD"}
    assert f"{hub.url}/somebody/new: would be made" in result.stdout
    for name in (*ADDED, "model.safetensors", "recipe.lock.json"):
        assert name in result.stdout
    assert "base_model_relation: quantized" in result.stdout
    shown = json.loads(run(out, "--dry-run", "--push", "somebody/new", "--json").stdout)
    assert shown["push"]["create"]
    assert shown["push"]["sent"] == shown["files"]


@pytest.fixture
def evaluated(hub: HubServer, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A folder, scores of two variants, and an evaluation of them."""
    out = converted(hub, tmp_path / "out")
    scores = tmp_path / "scores.jsonl"
    scores.write_text("as they are\n")
    found = compared(made_up({name: one_seed(values * 8) for name, values in VALUES.items()}))
    inputs = [{"name": scores.name, "sha256": file_sha256(scores), "scores": 72}]
    document = found.to_json_value() | {"inputs": inputs}
    path = tmp_path / "evaluation.json"
    path.write_bytes(document_bytes(document))
    return out, path, scores


def test_evidence_goes_along(evaluated: tuple[Path, Path, Path]) -> None:
    out, path, scores = evaluated
    result = run(out, "--evaluation", path, "--scores", scores, "--variant", "int8")
    assert result.exit_code == 0, result.output
    assert (out / path.name).read_bytes() == path.read_bytes()
    assert (out / scores.name).read_bytes() == scores.read_bytes()
    card = (out / "README.md").read_text("utf-8")
    assert "quantrecipe evaluate compare scores.jsonl" in card


def test_evidence_has_to_fit(evaluated: tuple[Path, Path, Path], tmp_path: Path) -> None:
    out, path, scores = evaluated
    assert kinds(run(out, "--evaluation", path).exception) == ["no-variant"]
    wrong = run(out, "--evaluation", path, "--variant", "in8")
    assert kinds(wrong.exception) == ["unknown-variant"]
    assert "'int8'" in str(wrong.exception)
    scores.write_text("others\n")
    unused = run(out, "--evaluation", path, "--variant", "int8", "--scores", scores)
    assert kinds(unused.exception) == ["unused-scores"]
    declared = json.loads(path.read_text()) | {"recipe": {"name": "x", "sha256": "0" * 64}}
    path.write_bytes(document_bytes(declared))
    foreign = run(out, "--evaluation", path, "--variant", "int8")
    assert kinds(foreign.exception) == ["another-recipe"]
    taken = tmp_path / "other" / "config.json"
    taken.parent.mkdir()
    declared.pop("recipe")
    taken.write_bytes(document_bytes(declared))
    assert kinds(run(out, "--evaluation", taken, "--variant", "int8").exception) == [
        "name-conflict"
    ]


def test_a_script_of_ones_own_has_to_be_one(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out")
    script = tmp_path / "mine.py"
    script.write_text(OWN)
    assert run(out, "--usage", script).exit_code == 0
    assert (out / "usage.py").read_bytes() == script.read_bytes()
    card = (out / "README.md").read_text("utf-8")
    assert 'python usage.py "seven" --seed 3\n' in card
    assert "Draws a digit." in card
    assert "pip install torch safetensors diffusers\n" in card
    script.write_text("print(")
    assert kinds(run(out, "--usage", script, "--force").exception) == ["bad-script"]


def test_what_smooths_can_go_along(hub: HubServer, tmp_path: Path) -> None:
    import torch

    from tests.converter.making import save_statistics, weight_spec

    statistics = save_statistics(
        tmp_path / "statistics.safetensors",
        "model",
        {"a": torch.ones(2, 12), "b": torch.ones(2, 8)},
    )
    smoothing = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "statistics.safetensors",
    }
    scheme = {"weight": weight_spec("int8"), "smoothing": smoothing}
    out = converted(hub, tmp_path / "out", target="int8-scaled", schemes={"all": scheme})
    without = run(out)
    assert without.exit_code == 0, without.output
    assert "statistics.safetensors, which is not published" in without.stderr
    result = run(out, "--statistics", statistics, "--force")
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    assert (out / "statistics.safetensors").read_bytes() == statistics.read_bytes()
    assert not verify(out).problems
    for again in (run(out, "--statistics", statistics), run(out)):
        assert again.stdout == f"{out}: as it was\n"
        assert "warning" not in again.stderr
    other = tmp_path / "other.safetensors"
    other.write_bytes(statistics.read_bytes())
    assert kinds(run(out, "--statistics", other).exception) == ["unknown-statistics"]


def test_without_the_hub_the_cache_is_asked(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = converted(hub, tmp_path / "out")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    nothing = run(out)
    assert isinstance(nothing.exception, HubError)
    assert nothing.exception.kind == "offline"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot_download(BASE, endpoint=hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget()
    result = run(out)
    assert result.exit_code == 0, result.output
    assert not hub.requests
    assert front_matter(out)["license_name"] == "my-own"
    assert (out / "LICENSE.md").read_bytes() == base_files()["LICENSE.md"]
    pushed = run(out, "--push", "somebody/new")
    assert isinstance(pushed.exception, HubError)
    assert pushed.exception.kind == "offline"
