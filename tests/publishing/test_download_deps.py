"""What a checkpoint needs besides, fetched from a Hub; and what is said where that goes wrong."""

from __future__ import annotations

import importlib.util
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.publishing import scripts
from quantrecipe.publishing.facts import Needed
from quantrecipe.publishing.scripts import Component, download_script, pipeline_script
from quantrecipe.schema.names import NameMapping
from tests.support.hub_server import TOKEN, Fault, HubServer

REPO = "base/pipeline"
FILES = {
    "model_index.json": b"{}",
    "vae/odd[1]*.safetensors": b"v" * 3000,
    "vae/odd1x.safetensors": b"x" * 9,
    "transformer/weights.safetensors": b"w" * 5000,
}
WANTED = {path: len(FILES[path]) for path in ("model_index.json", "vae/odd[1]*.safetensors")}


def script(tmp_path: Path, commit: str, gated: bool = False, repo: str = REPO) -> Any:
    """The program, as a module."""
    path = tmp_path / "download_deps.py"
    path.write_bytes(download_script(Needed(repo, commit, gated, WANTED)))
    spec = importlib.util.spec_from_file_location("download_deps", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


@pytest.mark.parametrize("into", [None, "folder"])
def test_the_files_of_that_commit_are_fetched_once(
    hub: HubServer, tmp_path: Path, into: str | None
) -> None:
    module = script(tmp_path, hub.add(REPO, FILES))
    hub.commit(REPO, {"model_index.json": b"newer"})
    folder = tmp_path / into if into else None
    assert module.missing(folder) == WANTED
    found = module.fetch(folder)
    assert files_of(found) == {path: FILES[path] for path in WANTED}
    hub.forget()
    assert module.fetch(folder) == found
    assert not hub.requests
    if folder is not None:  # what was cut off is fetched again, and nothing else
        (folder / "vae/odd[1]*.safetensors").write_bytes(b"v")
        assert [*module.missing(folder)] == ["vae/odd[1]*.safetensors"]
        assert files_of(module.fetch(folder)) == {path: FILES[path] for path in WANTED}
        assert 3000 <= hub.sent < 3500


def test_the_command_line_says_what_it_does(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit = hub.add(REPO, FILES, gated=True, granted={TOKEN})
    module = script(tmp_path, commit, gated=True)
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["download_deps.py", "--out", str(out)])
    module.main()
    assert capsys.readouterr().out.splitlines() == [
        f"{REPO}, commit {commit}: 2 files, 3,002 bytes",
        f"It is gated: its terms are to be accepted at {hub.url}/{REPO}",
        "               2  model_index.json",
        "           3,000  vae/odd[1]*.safetensors",
        str(out),
    ]
    module.main()
    assert capsys.readouterr().out.splitlines()[1:] == [str(out)]
    shutil.rmtree(out)
    hub.repositories[REPO].granted.clear()
    with pytest.raises(SystemExit, match="error: base/pipeline is gated"):
        module.main()


Usage = namedtuple("Usage", "total used free")


def unplug(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.append(Fault(drop_after=-1, times=1000))
    monkeypatch.setattr("time.sleep", lambda _: None)  # before it is tried again


def fail(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.append(Fault(path="/resolve/", status=403, times=1000))


def go_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def fill_disk(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(9000, 7000, 2000))


def log_out(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def gate(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[REPO].gated = True


def gate_and_log_out(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    gate(hub, monkeypatch)
    log_out(hub, monkeypatch)


def hide(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    del hub.repositories[REPO]


def hide_and_log_out(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[REPO].private = True
    log_out(hub, monkeypatch)


def rewrite(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[REPO].commits.clear()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (gate, "{repo} is gated: accept its terms at {url}/{repo}"),
        (
            gate_and_log_out,
            "{repo} is gated: accept its terms at {url}/{repo}, then log in with: hf auth login",
        ),
        (hide, "there is no repository {url}/{repo}, or it is private: ask for access"),
        (
            hide_and_log_out,
            (
                "there is no repository {url}/{repo}, or it is private: ask for access"
                ", then log in with: hf auth login"
            ),
        ),
        (rewrite, "{url}/{repo} has no commit {commit}"),
        (unplug, "{url} cannot be reached: "),
        (fail, "{url} refuses: "),
        (go_offline, "{repo} is not in the cache, and HF_HUB_OFFLINE is set: unset it once"),
        (
            fill_disk,
            (
                "3,002 bytes are needed in {cache}, and 2,000 are free. Make room, or choose "
                "another folder with --out (or HF_HOME, for the cache)."
            ),
        ),
    ],
)
def test_what_went_wrong_is_said_in_a_line(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, said: str
) -> None:
    from huggingface_hub import constants

    commit = hub.add(REPO, FILES)
    module = script(tmp_path, commit)
    change(hub, monkeypatch)
    with pytest.raises(module.FetchError) as error:
        module.fetch()
    expected = said.format(
        repo=REPO, url=hub.url, commit=commit, cache=Path(constants.HF_HUB_CACHE)
    )
    if said.endswith(": "):
        assert str(error.value).startswith(expected)
    else:
        assert str(error.value) == expected


def test_a_file_of_another_size_is_not_taken(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script(tmp_path, hub.add(REPO, FILES))
    monkeypatch.setitem(module.FILES, "model_index.json", 3)
    with pytest.raises(module.FetchError, match=r"^model_index.json: not there, or not whole, in"):
        module.fetch()


TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=12)


def block(source: bytes, template: str, name: str) -> dict[str, Any]:
    """What is assigned in a block; all around it is as in the template."""
    head, _, rest = scripts._template(template).partition(f"# <{name}>\n")
    tail = rest.partition(f"# </{name}>\n")[2]
    text = source.decode()
    assert text.startswith(head)
    assert text.endswith(tail)
    found: dict[str, Any] = {}
    exec(f"from __future__ import annotations\n{text[len(head) : -len(tail)]}", found)
    return found


@given(TEXT, TEXT, st.booleans(), st.dictionaries(TEXT, st.integers(0, 1 << 60)))
def test_any_text_is_filled_in_as_it_is(
    repo: str, commit: str, gated: bool, files: dict[str, int]
) -> None:
    source = download_script(Needed(repo, commit, gated, files))
    found = block(source, "download_deps.py", "repository")
    assert (found["REPOSITORY"], found["COMMIT"], found["GATED"]) == (repo, commit, gated)
    assert found["FILES"] == files


def test_a_pipeline_is_filled_in() -> None:
    names = [
        NameMapping.model_validate({"from": "a.*.qkv", "into": ("a.*.q", "a.*.k")}),
        NameMapping.model_validate({"from": "o", "into": "out"}),
    ]
    components = {"transformer": Component("model", "Kind", "transformer/config.json")}
    source = pipeline_script("Pipeline", components, names)
    found = block(source, "usage_pipeline.py", "pipeline")
    assert found["PIPELINE"] == "Pipeline"
    assert found["COMPONENTS"] == {
        "transformer": {
            "part": "model",
            "library": "diffusers",
            "class_name": "Kind",
            "config": "transformer/config.json",
            "config_from": "here",
        }
    }
    assert found["NAMES"] == (("a.*.qkv", ("a.*.q", "a.*.k")), ("o", ("out",)))
