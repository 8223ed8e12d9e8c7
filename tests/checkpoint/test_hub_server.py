"""The Hub of the tests, as the real client sees it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from tests.support.hub_server import TOKEN, HubServer

# The client's own, when it uploads large files over plain HTTP.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "upload"
    (root / "sub").mkdir(parents=True)
    (root / "README.md").write_text("---\nlicense: mit\n---\n# Hello\n")
    (root / "sub" / "model.safetensors").write_bytes(WEIGHTS)
    (root / "config.json").write_text("{}")
    return root


@pytest.mark.parametrize("part", [1 << 30, 1000], ids=["whole", "in parts"])
def test_a_folder_that_is_uploaded_is_there(hub: HubServer, folder: Path, part: int) -> None:
    hub.multipart_over = part
    api = HfApi(endpoint=hub.url)
    for _ in range(2):
        assert api.create_repo("me/x", exist_ok=True, private=True).repo_id == "me/x"
    info = api.upload_folder(
        repo_id="me/x", folder_path=folder, commit_message="All", commit_description="of it"
    )
    repository = hub.repositories["me/x"]
    assert repository.private
    assert repository.refs["main"] == info.oid
    assert (repository.commits[info.oid].title, repository.commits[info.oid].description) == (
        "All",
        "of it",
    )
    assert {path: repository.content(path) for path in repository.files} == {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    fetched = hf_hub_download("me/x", "sub/model.safetensors", endpoint=hub.url)
    assert Path(fetched).read_bytes() == WEIGHTS
    assert api.file_exists("me/x", "config.json")
    (told,) = api.get_paths_info("me/x", ["sub/model.safetensors"])
    assert isinstance(told, RepoFile)
    assert told.lfs is not None
    assert told.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()


def test_large_files_are_not_sent_twice(hub: HubServer, folder: Path) -> None:
    api = HfApi(endpoint=hub.url)
    api.create_repo("me/x")
    api.upload_folder(repo_id="me/x", folder_path=folder)
    hub.forget()
    (folder / "config.json").write_text('{"a": 1}')
    api.upload_folder(repo_id="me/x", folder_path=folder, delete_patterns="*.md")
    assert not [seen for seen in hub.requests if seen.method == "PUT"]
    assert hub.repositories["me/x"].content("config.json") == b'{"a": 1}'


def test_branches_and_deletions(hub: HubServer, folder: Path) -> None:
    api = HfApi(endpoint=hub.url)
    api.create_repo("me/x")
    api.create_branch("me/x", branch="other")
    api.upload_folder(repo_id="me/x", folder_path=folder, revision="other")
    assert api.list_repo_files("me/x") == []
    assert len(api.list_repo_files("me/x", revision="other")) == 3
    api.delete_file("config.json", "me/x", revision="other")
    api.delete_folder("sub", "me/x", revision="other")
    assert api.list_repo_files("me/x", revision="other") == ["README.md"]
    api.delete_repo("me/x")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/x")


def test_who_may_write(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("o/n", {})
    assert HfApi(endpoint=hub.url).whoami()["name"] == "somebody"
    monkeypatch.delenv("HF_TOKEN")
    api = HfApi(endpoint=hub.url)
    for call in (
        lambda: api.create_repo("me/x"),
        lambda: api.upload_folder(repo_id="o/n", folder_path=folder),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == 401
    assert hub.repositories.keys() == {"o/n"}
    assert TOKEN not in {seen.token for seen in hub.requests[-2:]}
