"""Opening a checkpoint: what says what it is, and everything that does not hold."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantrecipe.checkpoint import SourceReader
from quantrecipe.converter import convert
from quantrecipe.loaders import load_state_dict, open_checkpoint
from quantrecipe.schema.canonical import canonical_bytes, lock_digest
from quantrecipe.schema.lock import LOCK_NAME
from quantrecipe.schema.problems import InvalidInput
from tests.converter.making import Json, Tensors, parsed, read_lock, recipe, save, small

PARTS = ("one", "two")
FILE = "model.safetensors"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A converted checkpoint of one part."""
    small(tmp_path / "in.safetensors")
    keep = [{"modules": ["b"], "dtype": "bfloat16", "reason": "small"}]
    return convert(
        parsed(recipe(protected=keep)), tmp_path / "in.safetensors", tmp_path / "out"
    ).out


def convert_parts(folder: Path, target: Json) -> Path:
    """A converted checkpoint of two parts."""
    for index, part in enumerate(PARTS):
        small(folder / "in" / part / "m.safetensors", seed=index)
    document = recipe() | {
        "source": {"layout": "plain", "parts": {part: part for part in PARTS}},
        "target": target,
    }
    return convert(parsed(document), folder / "in", folder / "out").out


def problems_of(path: Path, **how: Any) -> dict[str, str]:
    """Kind to tensor of every problem; the checkpoint must not open."""
    with pytest.raises(InvalidInput) as error:
        open_checkpoint(path, **how)
    return {problem.kind: problem.tensor or "" for problem in error.value.problems}


def edit(path: Path, change: Callable[[Tensors], None]) -> None:
    """Rewrite a file with other tensors and the same metadata."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)


def edit_lock(folder: Path, change: Callable[[Json], None]) -> None:
    lock = read_lock(folder)
    change(lock)
    lock["sha256"] = lock_digest(lock)
    (folder / LOCK_NAME).write_text(json.dumps(lock))


# What says what it is


def test_by_its_lock(made: Path) -> None:
    for path in (made, made / FILE, str(made)):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.lock is not None
            assert checkpoint.layout.name == "int8-scaled"
            assert checkpoint.source_layout is not None
            assert checkpoint.source_layout.name == "plain"
            assert list(checkpoint.parts) == ["model"]
            assert set(checkpoint.part().modules) == {"a", "b"}
            assert set(checkpoint.part().others) == {"norm.weight"}
            locked = checkpoint.locked("a", "model")
            assert locked is not None
            assert locked.scheme == "all"
            assert checkpoint.locked("norm", "model") is None


def test_by_its_metadata_alone(made: Path, tmp_path: Path) -> None:
    expected = load_state_dict(made)
    (made / LOCK_NAME).unlink()
    elsewhere = tmp_path / "renamed.safetensors"
    shutil.copy(made / FILE, elsewhere)
    for path in (made, made / FILE, elsewhere):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.lock is None
            assert checkpoint.recipe is not None
            assert checkpoint.recipe.name == "small"
            assert checkpoint.locked("a", "model") is None
        found = load_state_dict(path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_by_the_callers_word(made: Path, tmp_path: Path) -> None:
    expected = load_state_dict(made)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(made / FILE), bare)
    assert problems_of(bare) == {"unknown-checkpoint": ""}
    with open_checkpoint(bare, layout="int8-scaled") as checkpoint:
        assert (checkpoint.recipe, checkpoint.lock) == (None, None)
        assert torch.equal(checkpoint.weight("a"), expected["a.weight"])
    assert load_state_dict(bare, layout="int8-scaled").keys() == expected.keys()


def test_a_lock_of_other_files_is_not_the_lock_of_this_one(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    small(tmp_path / "2.safetensors", seed=1)
    second = convert(
        parsed(recipe(target_fields={"file": "second.safetensors"})),
        tmp_path / "2.safetensors",
        other,
    ).out
    shutil.copy(second / "second.safetensors", made)
    with open_checkpoint(made / "second.safetensors") as checkpoint:
        assert checkpoint.lock is None
        assert checkpoint.recipe is not None
        assert checkpoint.recipe.target.file == "second.safetensors"


@pytest.mark.parametrize("locked", [True, False], ids=["lock", "no lock"])
@pytest.mark.parametrize(
    "target",
    [
        {"layout": "transformerlab"},
        {"layout": "int8-scaled", "parts": {part: f"{part}.safetensors" for part in PARTS}},
        {"layout": "int8-scaled", "parts": {part: f"{part}/m.safetensors" for part in PARTS}},
        {"layout": "transformerlab", "max_shard_size": "100B"},
        {
            "layout": "int8-scaled",
            "max_shard_size": "100B",
            # The shards of the first must not be taken for those of the second.
            "parts": {"one": "m.safetensors", "two": "m-b.safetensors"},
        },
    ],
    ids=["one file", "two files", "two folders", "shards", "shards of two"],
)
def test_parts_files_and_shards(tmp_path: Path, target: Json, locked: bool) -> None:
    out = convert_parts(tmp_path, target)
    if not locked:
        (out / LOCK_NAME).unlink()
    with open_checkpoint(out) as checkpoint:
        assert list(checkpoint.parts) == list(PARTS)
        for seed, part in enumerate(PARTS):
            source = small(tmp_path / "again.safetensors", seed=seed)
            assert set(checkpoint.part(part).modules) == {"a", "b"}
            bias = checkpoint.module("a", part).tensors["bias"]
            assert torch.equal(checkpoint.tensor(bias), source["a.bias"])


@pytest.mark.parametrize("place", ["{part}.safetensors", "{part}/m.safetensors"])
def test_one_file_of_several_holds_its_own_part_only(tmp_path: Path, place: str) -> None:
    files = {part: place.format(part=part) for part in PARTS}
    out = convert_parts(tmp_path, {"layout": "int8-scaled", "parts": files})
    (out / LOCK_NAME).unlink()
    for part, file in files.items():
        with open_checkpoint(out / file) as checkpoint:
            assert list(checkpoint.parts) == [part]
    unclear = tmp_path / "unclear.safetensors"
    shutil.copy(out / files["one"], unclear)
    assert problems_of(unclear) == {"which-part": ""}


def test_one_shard_is_no_checkpoint(tmp_path: Path) -> None:
    out = convert_parts(tmp_path, {"layout": "transformerlab", "max_shard_size": "100B"})
    shard = min(out.glob("*.safetensors"))
    assert problems_of(shard) == {"one-of-several": ""}
    (out / LOCK_NAME).unlink()
    assert problems_of(shard) == {"one-of-several": ""}


# Strictness


def drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "kind", "tensor"),
    [
        (drop("norm.weight"), "missing-tensor", "norm.weight"),
        (drop("a.weight_scale"), "missing-scale", "a.weight"),
        (drop("b.weight"), "missing-tensor", "b.weight"),
        (put("c.weight", torch.ones(2, 2)), "extra-tensor", "c.weight"),
        (put("c.weight_scale", torch.ones(2)), "orphan-scale", "c.weight_scale"),
        (put("norm.weight", torch.ones(9).bfloat16()), "misshaped-tensor", "norm.weight"),
        (put("norm.weight", torch.ones(8).half()), "mistyped-tensor", "norm.weight"),
        (put("a.weight_scale", torch.ones(8, 1).double()), "mistyped-scale", "a.weight_scale"),
        (put("a.weight_scale", torch.ones(7, 1)), "misshaped-scale", "a.weight_scale"),
        (put("a.weight_scale", torch.ones(1)), "misshaped-tensor", "a.weight_scale"),
        (put("a.bias", torch.ones(3).bfloat16()), "misshaped-bias", "a.bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_is_not_as_it_was_written_is_named(
    made: Path, change: Callable[[Tensors], None], kind: str, tensor: str
) -> None:
    edit(made / FILE, change)
    assert problems_of(made).get(kind) == tensor


def test_every_problem_is_told_at_once(made: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["extra"] = tensors.pop("norm.weight")
        tensors["b.weight"] = tensors["b.weight"].half()

    edit(made / FILE, change)
    found = problems_of(made)
    assert found["missing-tensor"] == "norm.weight"
    assert found["extra-tensor"] == "extra"
    assert found["mistyped-tensor"] == "b.weight"


def test_a_renamed_tensor_is_recognised(made: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["norm.weights"] = tensors.pop("norm.weight")

    edit(made / FILE, change)
    with pytest.raises(InvalidInput, match=r"There is 'norm.weights'"):
        open_checkpoint(made)


def test_a_tensor_of_no_part_is_named_without_a_lock_too(tmp_path: Path) -> None:
    out = convert_parts(tmp_path, {"layout": "transformerlab"})
    (out / LOCK_NAME).unlink()
    edit(out / FILE, put("three.norm.weight", torch.ones(2)))
    assert problems_of(out) == {"extra-tensor": "three.norm.weight"}


@pytest.mark.parametrize("locked", [True, False], ids=["lock", "no lock"])
def test_an_index_left_beside_a_whole_file_is_of_no_matter(made: Path, locked: bool) -> None:
    index = {"metadata": {}, "weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}
    (made / f"{FILE}.index.json").write_text(json.dumps(index))
    if not locked:
        (made / LOCK_NAME).unlink()
    with open_checkpoint(made) as checkpoint:
        assert set(checkpoint.part().modules) == {"a", "b"}


def test_a_missing_file_is_named(made: Path) -> None:
    (made / FILE).unlink()
    with pytest.raises(InvalidInput, match=r"model\.safetensors"):
        open_checkpoint(made)


def test_another_conversion_of_the_same_shapes_is_not_this_one(made: Path, tmp_path: Path) -> None:
    """Names, types, shapes and places are all as the lock says; the recipe is not."""
    keep = [{"modules": ["b"], "dtype": "bfloat16", "reason": "large"}]
    other = convert(
        parsed(recipe(protected=keep)), tmp_path / "in.safetensors", tmp_path / "other"
    ).out
    shutil.copy(other / FILE, made / FILE)
    assert problems_of(made) == {"metadata-mismatch": ""}
    save_file(load_file(made / FILE), made / FILE)
    assert "metadata-mismatch" in problems_of(made)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda lock: lock["recipe"].update(name="other"), "digest-mismatch"),
        (lambda lock: lock.update(recipe_sha256="0" * 64), "digest-mismatch"),
        (lambda lock: lock["others"].pop(), "extra-tensor"),
        (lambda lock: lock["modules"][0]["tensors"].pop("bias"), "extra-tensor"),
        (
            lambda lock: lock["others"][0]["tensor"].update(shape=[4]),
            "misshaped-tensor",
        ),
        (lambda lock: lock["others"][0]["tensor"].update(dtype="float16"), "mistyped-tensor"),
    ],
    ids=["recipe", "digest", "other", "bias", "shape", "dtype"],
)
def test_an_edited_lock_does_not_open(
    made: Path, change: Callable[[Json], None], kind: str
) -> None:
    edit_lock(made, change)
    assert kind in problems_of(made)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "lock", "version": 2}'])
def test_a_lock_that_is_none_is_named(made: Path, text: str) -> None:
    (made / LOCK_NAME).write_text(text)
    with pytest.raises(InvalidInput, match=LOCK_NAME):
        open_checkpoint(made)


def rewrite_metadata(path: Path, value: str) -> None:
    tensors = load_file(path)
    save_file(tensors, path, {"quantrecipe": value})


@pytest.mark.parametrize("value", ["", "nonsense", "[]", "{}", '{"recipe": {}}'])
def test_metadata_that_is_no_recipe_is_named(made: Path, value: str) -> None:
    (made / LOCK_NAME).unlink()
    rewrite_metadata(made / FILE, value)
    assert problems_of(made) == {"bad-recipe-metadata": ""}


def test_an_edited_recipe_in_the_metadata_is_found(made: Path) -> None:
    (made / LOCK_NAME).unlink()
    with safe_open(made / FILE, "pt") as file:
        document = json.loads(file.metadata()["quantrecipe"])
    document["recipe"]["name"] = "other"
    rewrite_metadata(made / FILE, canonical_bytes(document).decode())
    assert problems_of(made) == {"bad-recipe-metadata": ""}


def test_nothing_there_is_said_with_what_is_near(made: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no such file or folder\n.*'out'"):
        open_checkpoint(made.with_name("oud"))


# Digests


def flip(folder: Path, tensor: str) -> None:
    path = folder / FILE
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    data[8 + length + header[tensor]["data_offsets"][1] - 1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("tensor", ["a.weight", "a.weight_scale", "a.bias", "norm.weight"])
def test_a_flipped_bit_is_found_where_digests_are_checked(made: Path, tensor: str) -> None:
    flip(made, tensor)
    load_state_dict(made)
    with pytest.raises(InvalidInput) as error:
        load_state_dict(made, check="digests")
    (problem,) = error.value.problems
    assert (problem.kind, problem.tensor) == ("digest-mismatch", tensor)
    assert problem.file == str(made / FILE)


def test_digests_need_a_lock(made: Path) -> None:
    assert load_state_dict(made, check="digests").keys() == load_state_dict(made).keys()
    with pytest.raises(InvalidInput, match=r"layout= no recipe.lock.json is looked at"):
        open_checkpoint(made, layout="int8-scaled", check="digests")
    (made / LOCK_NAME).unlink()
    with pytest.raises(InvalidInput, match=r"there is no recipe.lock.json"):
        open_checkpoint(made, check="digests")


# Reading


def test_only_what_is_asked_for_is_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_into = SourceReader.read_into

    def watch(self: SourceReader, info: Any, start: int, buffer: Any) -> None:
        read.append(info.name)
        read_into(self, info, start, buffer)

    monkeypatch.setattr(SourceReader, "read_into", watch)
    with open_checkpoint(made) as checkpoint:
        checkpoint.part().modules["a"]
        assert read == []
        checkpoint.weight("b")
        assert read == ["b.weight"]
        checkpoint.weight("a")
        assert read == ["b.weight", "a.weight", "a.weight_scale"]


def test_a_file_that_changes_after_opening_is_refused(made: Path) -> None:
    with open_checkpoint(made) as checkpoint:
        flip(made, "a.weight")
        with pytest.raises(InvalidInput, match=r"was written to since|bytes, and had"):
            checkpoint.weight("a")


def test_names_that_are_not_there_are_recognised(made: Path) -> None:
    with open_checkpoint(made) as checkpoint:
        with pytest.raises(InvalidInput, match=r"no part 'modle'\n  Did you mean 'model'"):
            checkpoint.part("modle")
        with pytest.raises(InvalidInput, match=r"no module 'aa'\n  Did you mean 'a'"):
            checkpoint.module("aa")


def test_two_parts_have_to_be_told_apart(tmp_path: Path) -> None:
    out = convert_parts(tmp_path, {"layout": "transformerlab"})
    with open_checkpoint(out) as checkpoint, pytest.raises(InvalidInput, match="one, two"):
        checkpoint.weight("a")


def test_a_closed_checkpoint_reads_nothing(made: Path) -> None:
    with open_checkpoint(made) as checkpoint:
        pass
    with pytest.raises(ValueError, match="closed"):
        checkpoint.weight("a")


def test_a_factor_that_nothing_can_be_divided_by_is_refused(tmp_path: Path) -> None:
    factors = torch.tensor([1.0, 2.0, 0.0, 1.0])
    path = save(
        tmp_path / "m.safetensors",
        {
            "a.weight": torch.ones(2, 4, dtype=torch.int8),
            "a.weight_scale": torch.ones(2, 1),
            "a.smoothing": factors,
        },
    )
    with open_checkpoint(path, layout="int8-scaled") as checkpoint:
        with pytest.raises(InvalidInput, match=r"factor 0.0 at index \[2\]") as error:
            checkpoint.weight("a")
        assert error.value.problems[0].tensor == "a.smoothing"
