"""Onto the Hub: one commit, nothing sent twice, nobody's files lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantrecipe.checkpoint.hub.errors import HubError
from quantrecipe.schema.problems import InvalidInput
from tests.converter.making import Json
from tests.publishing.making import BASE, base_files, converted, run
from tests.support.hub_client import hub as hub
from tests.support.hub_server import TOKEN, Fault, HubServer

# The client hands bytes to the HTTP library as it is no longer done.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "somebody/quantized"
SHARDS: Json = {"target_fields": {"max_shard_size": "100B"}}


def here(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def on_hub(hub: HubServer, repo: str = REPO) -> dict[str, bytes]:
    repository = hub.repositories[repo]
    return {path: repository.content(path) for path in repository.files}


def blobs_sent(hub: HubServer) -> list[str]:
    return [seen.path for seen in hub.requests if seen.method == "PUT" and "/blobs/" in seen.path]


def kind(error: BaseException | None) -> str:
    assert isinstance(error, HubError)
    return error.kind


def test_a_repository_is_made_in_one_commit(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out", **SHARDS)
    result = run(out, "--push", REPO, "--message", "First")
    assert result.exit_code == 0, result.output
    assert on_hub(hub) == here(out)
    repository = hub.repositories[REPO]
    assert [commit.title for commit in repository.commits.values()] == ["initial commit", "First"]
    assert result.stdout.endswith(f"{hub.url}/{REPO} at {repository.refs['main']}\n")
    assert not repository.private
    assert not repository.gated


def test_what_is_there_is_not_sent_again(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out", **SHARDS)
    run(out, "--push", REPO)
    commit = hub.repositories[REPO].refs["main"]
    hub.forget()
    again = run(out, "--push", REPO)
    assert again.exit_code == 0, again.output
    assert hub.repositories[REPO].refs["main"] == commit
    assert {seen.method for seen in hub.requests} <= {"GET", "HEAD"}
    run(out, "--push", REPO, "--license", "mit", "--force")
    assert not blobs_sent(hub)
    assert b"license: mit" in on_hub(hub)["README.md"]


def test_another_checkpoint_takes_the_place_of_the_first(hub: HubServer, tmp_path: Path) -> None:
    run(converted(hub, tmp_path / "first", **SHARDS), "--push", REPO)
    hub.commit(REPO, {"notes.txt": b"mine"})
    second = converted(hub, tmp_path / "second")
    result = run(second, "--push", REPO)
    assert result.exit_code == 0, result.output
    assert on_hub(hub) == here(second) | {"notes.txt": b"mine"}


def test_the_files_of_something_else_are_left_alone(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out")
    hub.add(REPO, {"model.safetensors": b"another", "README.md": b"# Mine\n"})
    result = run(out, "--push", REPO)
    assert isinstance(result.exception, InvalidInput)
    assert result.exception.problems[0].kind == "not-a-checkpoint"
    assert on_hub(hub) == {"model.safetensors": b"another", "README.md": b"# Mine\n"}
    assert run(out, "--push", REPO, "--force").exit_code == 0
    assert on_hub(hub) == here(out)


def test_after_an_interruption_only_the_rest_is_sent(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = converted(hub, tmp_path / "out", **SHARDS)
    hub.faults = [Fault(path=r"/commit/", method="POST", status=403, times=1)]
    first = run(out, "--push", REPO)
    assert kind(first.exception) == "forbidden"
    sent = blobs_sent(hub)
    assert len(sent) == len(list(out.glob("*.safetensors"))) > 2
    assert list(on_hub(hub)) == []
    hub.forget()
    again = run(out, "--push", REPO)
    assert again.exit_code == 0, again.output
    assert not blobs_sent(hub)
    assert on_hub(hub) == here(out)


@pytest.mark.parametrize("status", [None, 500], ids=["cut off", "failing"])
def test_a_lost_connection_is_opened_again(
    hub: HubServer, tmp_path: Path, status: int | None
) -> None:
    out = converted(hub, tmp_path / "out", **SHARDS)
    drop = -1 if status is None else None
    hub.faults = [Fault(path=r"objects/batch", times=1, status=status, drop_after=drop)]
    result = run(out, "--push", REPO)
    assert result.exit_code == 0, result.output
    assert on_hub(hub) == here(out)


def test_it_is_closed_before_anything_is_in_it(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out")
    result = run(out, "--push", REPO, "--private", "--gated", "manual")
    assert result.exit_code == 0, result.output
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.gated == "manual"
    writing = [seen.path for seen in hub.requests if seen.method in ("POST", "PUT")]
    made, closed = "/api/repos/create", f"/api/models/{REPO}/settings"
    assert (
        writing.index(made)
        < writing.index(closed)
        < writing.index(f"/api/models/{REPO}/commit/main")
    )
    assert writing.index(closed) < writing.index(
        next(path for path in writing if "/blobs/" in path)
    )


def test_what_comes_of_a_gated_model_is_asked_about(hub: HubServer, tmp_path: Path) -> None:
    hub.add(BASE, base_files(), gated="auto", granted={TOKEN})
    out = converted(hub, tmp_path / "out")
    open_to_all = run(out, "--dry-run", "--push", REPO)
    assert f"{BASE} is gated, and {REPO} would not be" in open_to_all.stderr
    assert "warning" not in run(out, "--dry-run", "--push", REPO, "--gated", "auto").stderr


def test_what_stands_in_the_way_is_said(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = converted(hub, tmp_path / "out")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert kind(run(out, "--push", REPO, "--license", "mit").exception) == "bad-token"
    monkeypatch.delenv("HF_TOKEN")
    none = run(out, "--push", REPO)
    assert kind(none.exception) == "no-token"
    assert "hf auth login" in str(none.exception)
    assert "usage.py" not in here(out), "nothing is written before the Hub was asked"
    assert REPO not in hub.repositories


def test_what_the_hub_does_not_allow_is_said(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out")
    hub.faults = [Fault(path="/api/repos/create", status=403, headers={"X-Error-Message": "No."})]
    refused = run(out, "--push", REPO)
    assert kind(refused.exception) == "forbidden"
    assert f"hf://{REPO}: is not allowed: No." in str(refused.exception)
    hub.faults = [Fault(path="/blobs/", method="PUT", status=403, times=9)]
    assert kind(run(out, "--push", REPO).exception) == "forbidden"
    assert on_hub(hub) == {}


def test_damaged_weights_are_not_sent(hub: HubServer, tmp_path: Path) -> None:
    out = converted(hub, tmp_path / "out")
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    result = run(out, "--push", REPO)
    assert isinstance(result.exception, InvalidInput)
    assert REPO not in hub.repositories
    assert "README.md" not in here(out)


def test_options_of_a_push_need_one(tmp_path: Path) -> None:
    assert run(tmp_path, "--private").exit_code == 2
    assert run(tmp_path, "--push", "no-owner").exit_code == 2


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_the_hub_has_what_is_here_whatever_was_there(
    hub: HubServer, tmp_path: Path, data: st.DataObject
) -> None:
    """Edits of the repository by others, to files of ours, are undone; other files stay."""
    out = tmp_path / "out"
    if not out.exists():
        out = converted(hub, out, **SHARDS)
    run(out, "--push", REPO)
    names = sorted(set(here(out)) - {"recipe.lock.json"})
    changed = data.draw(st.sets(st.sampled_from(names), max_size=3))
    hub.commit(REPO, dict.fromkeys(changed, b"changed") | {"other.bin": b"kept"})
    hub.forget()
    result = run(out, "--push", REPO)
    assert result.exit_code == 0, result.output
    assert on_hub(hub) == here(out) | {"other.bin": b"kept"}
    commits = [seen for seen in hub.requests if "/commit/" in seen.path]
    assert len(commits) == bool(changed)
