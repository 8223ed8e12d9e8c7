"""Finding the weights in a folder that nobody has described."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from quantrecipe.checkpoint.survey import Survey, survey
from quantrecipe.schema.gguf import plan_gguf_file
from quantrecipe.schema.placement import encode_header
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.tensors import OutputTensor

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = [OutputTensor(name, "int8", (2,)) for name in names]
    path.write_bytes(encode_header(tensors, {}) + bytes(2 * len(names)))


def index(path: Path, weight_map: Mapping[str, str]) -> None:
    path.write_text(json.dumps({"weight_map": weight_map}))


def locations(found: Survey) -> dict[str, str]:
    return {part.name: piece.location for piece in found.pieces for part in piece.parts}


def kinds(found: Survey) -> list[str]:
    return [problem.kind for problem in found.problems]


def sharded(folder: Path) -> None:
    write(folder / FIRST, "a")
    write(folder / SECOND, "b")
    index(folder / "model.safetensors.index.json", {"a": FIRST, "b": SECOND})


def test_a_file_and_its_folder_are_one_part(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", "a", "b")
    for path in (tmp_path, tmp_path / "x.safetensors"):
        found = survey(path)
        assert locations(found) == {"model": "."}
        assert set(found.pieces[0].parts[0].tensors) == {"a", "b"}
        assert not found.problems
        assert not found.notes
        assert found.folder == tmp_path


def test_shards_are_one_part_by_folder_and_by_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    write(tmp_path / "consolidated.safetensors", "c")
    found = survey(tmp_path)
    assert locations(found) == {"model": "."}
    assert [file.path.name for file in found.files] == [FIRST, SECOND]
    assert "consolidated" in found.notes[0]
    by_index = survey(tmp_path / "model.safetensors.index.json")
    assert locations(by_index) == {"model": "model.safetensors.index.json"}
    assert len(by_index.files) == 2


def test_each_subfolder_of_a_pipeline_is_a_part(tmp_path: Path) -> None:
    write(tmp_path / "transformer" / "w.safetensors", "a")
    sharded(tmp_path / "Text-Encoder 2")
    (tmp_path / "scheduler").mkdir()
    assert locations(survey(tmp_path)) == {
        "text_encoder_2": "Text-Encoder 2",
        "transformer": "transformer",
    }


def test_subfolders_beside_weights_are_only_noted(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", "a")
    write(tmp_path / "onnx" / "w.safetensors", "a")
    found = survey(tmp_path)
    assert locations(found) == {"model": "."}
    assert "onnx/" in found.notes[0]


def test_files_without_an_index_are_parts_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "1.safetensors", "a")
    write(tmp_path / "x.fp16.safetensors", "a")
    found = survey(tmp_path)
    assert locations(found) == {"part_1": "1.safetensors", "x_fp16": "x.fp16.safetensors"}
    assert found.notes
    assert not found.problems


def test_a_shard_by_itself_is_noted(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert "shard 2 of 2" in survey(tmp_path / SECOND).notes[0]


def test_parts_of_the_same_files_are_one_piece(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", "a")
    found = survey(tmp_path, {"one": "x.safetensors", "two": "x.safetensors"})
    assert [[part.name for part in piece.parts] for piece in found.pieces] == [["one", "two"]]
    assert len(found.files) == 1


def test_what_is_left_of_a_broken_checkpoint_is_opened(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SECOND).unlink()
    found = survey(tmp_path)
    assert (kinds(found), [file.path.name for file in found.files]) == (["missing-shard"], [FIRST])

    (tmp_path / SECOND).write_bytes(b"\x08")
    found = survey(tmp_path)
    assert (kinds(found), [file.path.name for file in found.files]) == (["truncated-file"], [FIRST])

    write(tmp_path / SECOND, "b", "c")
    assert kinds(survey(tmp_path)) == ["unindexed-tensor"]

    (tmp_path / SECOND).unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    found = survey(tmp_path)
    assert kinds(found) == ["missing-index"]
    assert "number 2" in found.problems[0].message
    assert locations(found) == {"model": "*.safetensors"}


def test_gguf_is_opened(tmp_path: Path) -> None:
    tensors = [OutputTensor("model.a.weight", "float32", (2, 3))]
    planned = plan_gguf_file("x.gguf", tensors, {"general.architecture": "any"})
    file = tmp_path / "x.gguf"
    file.write_bytes(planned.header + bytes(planned.size - len(planned.header)))
    for path in (tmp_path, file):
        found = survey(path)
        assert [list(part.tensors) for piece in found.pieces for part in piece.parts] == [
            ["model.a.weight"]
        ]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("x.safetensors", b"", "empty-file"),
        ("x.bin", b"PK\x03\x04" + bytes(80), "not-safetensors"),
        ("missing", None, "missing-source"),
        ("empty", "folder", "no-safetensors"),
    ],
    ids=["empty file", "pickle", "missing", "empty folder"],
)
def test_what_cannot_be_opened_says_why(
    tmp_path: Path, name: str, content: bytes | str | None, kind: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
    with pytest.raises(InvalidInput) as caught:
        survey(path)
    assert [problem.kind for problem in caught.value.problems] == [kind]


def test_a_part_that_is_not_there_leaves_the_others(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", "a")
    found = survey(tmp_path, {"one": "x.safetensors", "two": "y.safetensors"})
    assert (locations(found), kinds(found)) == ({"one": "x.safetensors"}, ["missing-part"])
    with pytest.raises(InvalidInput):
        survey(tmp_path, {"one": "../x.safetensors"})
