from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantrecipe.checkpoint import SourceError, open_parts
from quantrecipe.schema.problems import InvalidInput, Problem

INDEX = "model.safetensors.index.json"


def put(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(2) for name in names}, path)
    return path


def put_shards(folder: Path, index: str = INDEX, **shards: str) -> None:
    """Shards ``{stem: names, separated by spaces}`` and the index that fits them."""
    for stem, names in shards.items():
        put(folder / f"{stem}.safetensors", *names.split())
    weight_map = {
        name: f"{stem}.safetensors" for stem, names in shards.items() for name in names.split()
    }
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def problems_of(root: Path, **parts: str) -> tuple[Problem, ...]:
    with pytest.raises(InvalidInput) as caught:
        open_parts(root, parts)
    return caught.value.problems


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    put(tmp_path / "transformer" / "m.safetensors", "b", "a")
    (tmp_path / "transformer" / "config.json").write_text("{}")
    (part,) = open_parts(tmp_path, {"model": "transformer"})
    assert (part.name, part.root) == ("model", tmp_path / "transformer")
    assert [file.relative for file in part.files] == ["transformer/m.safetensors"]
    assert part.tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("location", ["w", f"w/{INDEX}"], ids=["folder", "index"])
def test_shards_through_their_index(tmp_path: Path, location: str) -> None:
    put_shards(tmp_path / "w", m1="a b", m2="c")
    put(tmp_path / "w" / "consolidated.safetensors", "other")
    (part,) = open_parts(tmp_path, {"model": location})
    assert part.root == tmp_path / "w"
    assert [file.relative for file in part.files] == ["w/m1.safetensors", "w/m2.safetensors"]
    assert {name: one.file.name for name, one in part.tensors.items()} == {
        "a": "m1.safetensors",
        "b": "m1.safetensors",
        "c": "m2.safetensors",
    }


def test_a_file_a_folder_and_a_glob_below_one_root(tmp_path: Path) -> None:
    put(tmp_path / "a.safetensors", "a")
    put(tmp_path / "deep" / "er" / "b1.safetensors", "b1")
    put(tmp_path / "deep" / "er" / "b2.safetensors", "b2")
    (tmp_path / "deep" / "er" / "b.json").write_text("{}")
    file, folder, glob = open_parts(
        tmp_path, {"file": "a.safetensors", "folder": ".", "glob": "deep/*/b*"}
    )
    assert (file.root, folder.root, glob.root) == (tmp_path, tmp_path, tmp_path / "deep")
    assert file.files == folder.files
    assert file.files[0] is folder.files[0]
    assert glob.tensors.keys() == {"b1", "b2"}


def test_a_name_with_brackets_is_a_name_first(tmp_path: Path) -> None:
    put(tmp_path / "m[1].safetensors", "a")
    (part,) = open_parts(tmp_path, {"model": "m[1].safetensors"})
    assert part.tensors.keys() == {"a"}


def test_a_single_file_as_the_source(tmp_path: Path) -> None:
    path = put(tmp_path / "m.safetensors", "a")
    (part,) = open_parts(path, {"model": "."})
    assert (part.root, part.files[0].relative) == (tmp_path, "m.safetensors")
    (problem,) = problems_of(path, model="transformer")
    assert problem.kind == "not-a-folder"


def test_symlinked_files_and_folders_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "blobs" / "0123", "a")
    snapshot = tmp_path / "snapshot" / "transformer"
    snapshot.mkdir(parents=True)
    (snapshot / "m.safetensors").symlink_to("../../blobs/0123")
    (part,) = open_parts(tmp_path / "snapshot", {"model": "transformer"})
    assert part.files[0].relative == "transformer/m.safetensors"


def _several(folder: Path) -> None:
    put(folder / "w" / "a.safetensors", "a")
    put(folder / "w" / "b.safetensors", "b")


def _several_indexes(folder: Path) -> None:
    put_shards(folder / "w", m1="a")
    put_shards(folder / "w", "fp16." + INDEX, f1="a")


def _pickles(folder: Path) -> None:
    (folder / "w").mkdir()
    (folder / "w" / "pytorch_model.bin").write_bytes(b"")


def _pipeline(folder: Path) -> None:
    put(folder / "w" / "transformer" / "m.safetensors", "a")
    put(folder / "w" / "text-encoder" / "m.safetensors", "a")
    (folder / "w" / "scheduler").mkdir()


def _empty(folder: Path) -> None:
    (folder / "w").mkdir()


def _near(folder: Path) -> None:
    put(folder / "w1" / "m.safetensors", "a")


FOLDERS: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    "several files": (
        _several,
        "ambiguous-part",
        ["a.safetensors, b.safetensors", '"w/*.safetensors"', '{"model": "w/a.safetensors"}'],
    ),
    "several indexes": (_several_indexes, "ambiguous-part", ["2 indexes", "w/fp16."]),
    "pickles only": (
        _pickles,
        "no-safetensors",
        ["only pytorch_model.bin", "nothing is ever unpickled"],
    ),
    "pipeline": (
        _pipeline,
        "no-safetensors",
        ["text-encoder/, transformer/", '"text_encoder": "w/text-encoder"'],
    ),
    "empty": (_empty, "no-safetensors", ["it is empty"]),
    "missing": (_near, "missing-part", ["Did you mean 'w1'?"]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_does_not_say_what_it_is(case: str, tmp_path: Path) -> None:
    build, kind, said = FOLDERS[case]
    build(tmp_path)
    (problem,) = problems_of(tmp_path, model="w")
    assert problem.kind == kind
    for words in said:
        assert words in str(problem)


@pytest.mark.parametrize(
    "location",
    ["../x", "a/../../x", "/etc/passwd", "a\\..\\x", "C:x", "", "a/..", "\\x", "a\0b"],
)
def test_nothing_outside_of_the_source_is_read(location: str, tmp_path: Path) -> None:
    put(tmp_path / "x", "a")
    (tmp_path / "root").mkdir()
    (problem,) = problems_of(tmp_path / "root", model=location)
    assert problem.kind == "outside-source"


def test_a_missing_source(tmp_path: Path) -> None:
    put(tmp_path / "ideogram-4" / "m.safetensors", "a")
    (problem,) = problems_of(tmp_path / "ideogram4", model=".")
    assert (problem.kind, problem.hint) == ("missing-source", "Did you mean 'ideogram-4'?")


def test_the_problems_of_all_parts_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"")
    _several(tmp_path)
    problems = problems_of(tmp_path, a="bad.safetensors", b="w", c="nowhere", d="bad.safetensors")
    kinds = [problem.kind for problem in problems]
    assert kinds == ["empty-file", "ambiguous-part", "missing-part"]


def test_a_tensor_in_two_files_of_a_part(tmp_path: Path) -> None:
    put(tmp_path / "m1.safetensors", "a", "b")
    put(tmp_path / "m2.safetensors", "b", "c")
    (problem,) = problems_of(tmp_path, model="*.safetensors")
    assert problem.kind == "duplicate-tensor"
    assert "1 tensors" in problem.message
    assert "b (also in m1.safetensors)" in problem.message


@pytest.mark.parametrize("pattern", ["x*", "*.txt", "**x"])
def test_a_glob_without_a_match(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (problem,) = problems_of(tmp_path, model=pattern)
    assert problem.kind == "missing-part"
    assert pattern in problem.message


def test_an_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    put_shards(tmp_path, m1="a b", m2="c")
    put(tmp_path / "m1.safetensors", "a", "new")
    problems = problems_of(tmp_path, model=".")
    assert [problem.kind for problem in problems] == ["index-mismatch", "unindexed-tensor"]
    assert "m1.safetensors: 1 tensors" in problems[0].message
    assert problems[0].message.endswith(": b")
    assert problems[1].message.endswith(": new")


def test_missing_shards_are_counted_and_named(tmp_path: Path) -> None:
    put_shards(tmp_path, m1="a", m2="b", m3="c")
    (tmp_path / "m1.safetensors").unlink()
    (tmp_path / "m3.safetensors").unlink()
    (problem,) = problems_of(tmp_path, model=".")
    assert problem.kind == "missing-shard"
    assert "2 of the 3" in problem.message
    assert "m1.safetensors, m3.safetensors" in problem.message


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"{}", id="no map"),
        pytest.param(b'{"weight_map": {}}', id="empty map"),
        pytest.param(b'{"weight_map": {"a": 1}}', id="number"),
        pytest.param(b'{"weight_map": {"a": "../m.safetensors"}}', id="upwards"),
        pytest.param(b'{"weight_map": {"a": "w/m.safetensors"}}', id="folder"),
        pytest.param(b'{"weight_map": {"a": "w\\\\m.safetensors"}}', id="backslash"),
        pytest.param(b'{"weight_map": {"a": "m.bin"}}', id="pickle"),
        pytest.param(b'{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}', id="twice"),
        pytest.param(b'{"x": NaN}', id="NaN"),
        pytest.param(b"\xff", id="not text"),
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)
def test_a_malformed_index(index: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(index)
    (problem,) = problems_of(tmp_path, model=".")
    assert (problem.kind, problem.file) == ("bad-index", str(tmp_path / INDEX))


def test_an_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(SourceError, match="Permission denied"):
        open_parts(tmp_path, {"model": "."})
