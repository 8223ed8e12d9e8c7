"""``verify``: what holds, what does not, and what each is called."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantrecipe.converter import convert
from quantrecipe.evaluate import Verification, verify, workload
from quantrecipe.schema.canonical import document_bytes, lock_digest
from quantrecipe.schema.lock import LOCK_NAME
from quantrecipe.schema.parsed import MAX_BYTES
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.validation import load_lock
from tests.converter.making import (
    FLOAT8,
    KINDS,
    WEIGHTS,
    Json,
    everything,
    numbers,
    parsed,
    recipe,
    save,
    save_statistics,
    small,
    weight_spec,
)
from tests.evaluate.tampering import edit_lock, edit_tensor, tensors_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    small(tmp_path / "source" / "m.safetensors")
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path: Path, source: Path) -> Path:
    convert(parsed(recipe()), source, tmp_path / "out")
    return tmp_path / "out"


def only(found: Verification) -> Problem:
    assert len(found.problems) == 1, found.problems
    return found.problems[0]


def kinds(found: Verification) -> set[str]:
    return {problem.kind for problem in found.problems}


def flip_code(index: int, by: int) -> Callable[[bytearray], None]:
    def change(payload: bytearray) -> None:
        payload[index] = (payload[index] + by) % 256

    return change


# What holds


def test_counts(out: Path, source: Path) -> None:
    found = verify(out, against=source)
    assert found.whole
    assert (found.files, found.tensors, found.modules) == (2, 6, 2)
    written = ("model.safetensors", "recipe.json")
    assert found.nbytes == sum((out / name).stat().st_size for name in written)
    assert [module.name for module in found.measured] == ["a", "b"]
    assert found.recipe == "small"


@pytest.mark.parametrize("name", sorted(WEIGHTS))
@pytest.mark.parametrize("kind", ["float64", "bfloat16", "float8_e4m3fn-block", "int8-group"])
def test_every_format_is_proven(tmp_path: Path, name: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    for module in ("a", "b"):
        made = KINDS[kind].build(rng, 9, 20)
        save(
            tmp_path / "source" / f"{module}.safetensors",
            {f"{module}.{role}": tensor for role, tensor in made.items()},
        )
    source = {"layout": everything(), "parts": {"model": "*.safetensors"}}
    made_by = parsed(recipe(WEIGHTS[name], target=everything()) | {"source": source})
    convert(made_by, tmp_path / "source", tmp_path / "out")
    found = verify(tmp_path / "out", against=tmp_path / "source", block_bytes=200)
    assert found.problems == ()
    assert all(0 < module.of_bound <= 1 for module in found.measured)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("passthrough", ["float32", "keep"])
def test_what_passes_through_is_proven(tmp_path: Path, kind: str, passthrough: str) -> None:
    rng = np.random.default_rng(5)
    tensors = {f"a.{role}": tensor for role, tensor in KINDS[kind].build(rng, 9, 20).items()}
    source = save(tmp_path / "m.safetensors", tensors | {"n": torch.ones(3)})
    fields = {"passthrough_dtype": passthrough}
    document = recipe(source=everything(), target=everything(), target_fields=fields)
    document |= {"rules": [], "schemes": {}}
    convert(parsed(document), source, tmp_path / "out")
    assert verify(tmp_path / "out", against=source, block_bytes=100).problems == ()


def test_smoothed_weights_are_proven_with_their_factors(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weight = numbers(rng, 8, 12).float()
    source = save(tmp_path / "m.safetensors", {"a.weight": weight})
    maxima = torch.from_numpy(np.abs(rng.standard_normal((2, 12)))).float()
    save_statistics(tmp_path / "statistics.safetensors", "model", {"a": maxima})
    smoothing = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "statistics.safetensors",
    }
    document = recipe(target=everything())
    document["schemes"]["all"]["smoothing"] = smoothing
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(document))
    convert(file, source, tmp_path / "out")
    assert verify(tmp_path / "out", against=source).problems == ()
    edit_tensor(tmp_path / "out", "a.smoothing", lambda data: data.__setitem__(3, data[3] ^ 1))
    found = verify(tmp_path / "out", against=source)
    assert {"scale-differs", "bound-broken"} & kinds(found)


def test_memory_and_blocks_never_change_what_is_found(out: Path, source: Path) -> None:
    whole, small_blocks = (verify(out, against=source, block_bytes=size) for size in (1 << 22, 1))
    assert whole == small_blocks


# What does not


def test_no_lock(out: Path) -> None:
    (out / LOCK_NAME).unlink()
    problem = only(verify(out))
    assert (problem.kind, problem.file) == ("no-lock", str(out / LOCK_NAME))


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.json"])
def test_a_file_that_is_gone(out: Path, name: str) -> None:
    (out / name).unlink()
    problem = only(verify(out))
    assert (problem.kind, problem.file) == ("missing-file", str(out / name))


@pytest.mark.parametrize("name", ["old.safetensors", "sub/m.safetensors.index.json"])
def test_a_file_too_many(out: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"{}")
    problem = only(verify(out))
    assert (problem.kind, problem.file) == ("extra-file", str(out / name))


def test_statistics_and_hidden_folders_are_no_weights(out: Path) -> None:
    (out / ".cache").mkdir()
    (out / ".cache" / "m.safetensors").write_bytes(b"")
    assert verify(out).whole


def test_a_truncated_file_is_told_of_with_its_tensors_that_are_left(out: Path) -> None:
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found = verify(out)
    assert "wrong-size" in kinds(found)
    assert not verify(out, quick=True).whole


def test_tensors_that_are_missing_extra_misshaped_and_mistyped(out: Path) -> None:
    path = out / "model.safetensors"
    tensors = load_file(path)
    tensors["extra"] = tensors.pop("norm.weight")
    tensors["a.bias"] = tensors["a.bias"].half()
    tensors["b.weight"] = tensors["b.weight"].reshape(8, 5)
    save_file(tensors, path)
    found = verify(out, quick=True)
    named = {(problem.kind, problem.tensor) for problem in found.problems}
    assert named >= {
        ("missing-tensor", "norm.weight"),
        ("extra-tensor", "extra"),
        ("mistyped-tensor", "a.bias"),
        ("misshaped-tensor", "b.weight"),
        ("metadata-mismatch", None),
    }


def test_everything_is_told_at_once(out: Path) -> None:
    (out / "recipe.json").unlink()
    (out / "x.safetensors").write_bytes(b"")
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    content[-400] ^= 1
    path.write_bytes(content)
    assert kinds(verify(out)) >= {"missing-file", "extra-file", "digest-mismatch"}


def test_another_recipe_beside_the_lock(out: Path) -> None:
    document = json.loads((out / "recipe.json").read_text())
    document["name"] = "another"
    (out / "recipe.json").write_text(json.dumps(document))
    assert only(verify(out)).kind == "recipe-differs"


def test_the_same_recipe_in_other_bytes(out: Path) -> None:
    document = json.loads((out / "recipe.json").read_text())
    (out / "recipe.json").write_text(json.dumps(document))
    assert only(verify(out)).kind == "rewritten"


@pytest.fixture
def with_sidecars(tmp_path: Path, source: Path) -> Path:
    (source / "config.json").write_text('{"layers": 2}')
    (source / "tokenizer.json").write_text("{}")
    convert(parsed(recipe()), source, tmp_path / "kept")
    return tmp_path / "kept"


def test_every_file_is_in_the_lock_once(with_sidecars: Path, shards: Path) -> None:
    for folder in (with_sidecars, shards):
        lock = json.loads((folder / LOCK_NAME).read_text())
        listed = [file["path"] for file in lock["outputs"] + lock["sidecars"]]
        written = {path.name for path in folder.iterdir()} - {LOCK_NAME}
        assert len(listed) == len(set(listed))
        assert set(listed) == written


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    ("content", "kind"),
    [(b'{"layers": 3}', "digest-mismatch"), (b"", "digest-mismatch"), (None, "missing-file")],
    ids=["edited", "empty", "gone"],
)
def test_a_sidecar_is_held_to_its_lock(
    with_sidecars: Path, content: bytes | None, kind: str, quick: bool
) -> None:
    assert verify(with_sidecars, quick=quick).whole
    path = with_sidecars / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    problem = only(verify(with_sidecars, quick=quick))
    assert (problem.kind, problem.file) == (kind, str(path))


def test_a_damaged_lock_says_so_and_everything_else_is_looked_at(out: Path) -> None:
    lock = json.loads((out / LOCK_NAME).read_text())
    lock["tool"]["name"] = "somebody's"
    (out / LOCK_NAME).write_bytes(document_bytes(lock))
    (out / "recipe.json").unlink()
    found = verify(out)
    assert [problem.kind for problem in found.problems] == ["lock-damaged", "missing-file"]
    damaged = found.problems[0]
    assert (damaged.file, damaged.pointer) == (str(out / LOCK_NAME), "/sha256")
    assert lock_digest(lock) in damaged.message
    assert damaged.line is not None


def test_a_lock_of_many_tensors_is_read_again(out: Path) -> None:
    def change(lock: Json) -> None:
        one = next(module for module in lock["modules"] if module["name"] == "a")
        lock["modules"] = []
        for index in range(60_000 // len(one["tensors"])):
            name = f"transformer.blocks.{index}.feed_forward.experts.gate_proj"
            tensors = {
                role: {**tensor, "name": f"{name}.{role}", "offset": 1000 * index}
                for role, tensor in one["tensors"].items()
            }
            lock["modules"].append({**one, "name": name, "tensors": tensors})

    edit_lock(out, change)
    assert (out / LOCK_NAME).stat().st_size > MAX_BYTES
    assert sum(1 for _ in load_lock(out / LOCK_NAME).tensors()) >= 60_000


def test_the_same_lock_in_other_bytes(out: Path) -> None:
    lock = json.loads((out / LOCK_NAME).read_text())
    (out / LOCK_NAME).write_text(json.dumps(lock))
    assert only(verify(out)).kind == "rewritten"


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="Linux counts what is read")
@pytest.mark.parametrize("shard", [None, "400KB"])
def test_every_byte_is_read_once(tmp_path: Path, shard: str | None) -> None:
    weights = {f"{index}.weight": torch.randn(512, 512) for index in range(8)}
    source = save(tmp_path / "m.safetensors", weights)
    fields = {"max_shard_size": shard} if shard is not None else {}
    out = convert(parsed(recipe(target_fields=fields)), source, tmp_path / "out").out
    verify(out)
    before = bytes_read()
    assert verify(out).whole
    there = sum(path.stat().st_size for path in out.iterdir())
    assert there <= bytes_read() - before < there + (16 << 10)


def bytes_read() -> int:
    """By this process, so far."""
    (line,) = [line for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line]
    return int(line.split()[1])


def test_a_reader_that_is_interrupted_reads_no_further(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(count: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(out, progress=interrupt)


def _set(pointer: str, value: Any) -> Callable[[Json], None]:
    *path, last = [int(key) if key.isdigit() else key for key in pointer.split("/")[1:]]

    def change(lock: Json) -> None:
        place: Any = lock
        for key in path:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return change


def _no_recipe(lock: Json) -> None:
    lock["sidecars"] = []


def _sidecar_of_an_outputs_name(lock: Json) -> None:
    lock["sidecars"].append(lock["outputs"][0])


def _sidecar_elsewhere(lock: Json) -> None:
    lock["sidecars"].append({"path": "../x", "bytes": 0, "sha256": "0" * 64})


def _twice(lock: Json) -> None:
    lock["others"].append(lock["others"][0])


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (_set("/modules/0/name", "c"), "not-the-plan"),
        (_set("/modules/0/scheme", "other"), "not-the-plan"),
        (_set("/modules/0/disposition", "protected"), "not-the-plan"),
        (_set("/modules/0/weight/granularity", "tensor"), "not-the-plan"),
        (_set("/modules/0/error", None), "bad-lock"),
        (_set("/modules/0/part", "other"), "bad-lock"),
        (_set("/modules/0/tensors/weight/role", "bias"), "bad-lock"),
        (_set("/modules/0/tensors/bias", None), "extra-tensor"),
        (_set("/modules/0/tensors/weight/shape", [12, 8]), "misshaped-tensor"),
        (_set("/modules/0/tensors/weight/bytes", 95), "bad-lock"),
        (_set("/modules/0/tensors/weight/file", "../x.safetensors"), "bad-lock"),
        (_set("/modules/0/tensors/weight/dtype", "int9"), "bad-lock"),
        (_set("/others/0/name", "nor"), "not-the-plan"),
        (_set("/others/0/tensor/offset", 0), "misplaced-tensor"),
        (_set("/outputs/0/path", "../x.safetensors"), "bad-lock"),
        (_set("/outputs/0/bytes", 5), "wrong-size"),
        (_set("/outputs/0/sha256", "0" * 64), "digest-mismatch"),
        (_set("/source", []), "bad-lock"),
        (_set("/source/0/part", "other"), "bad-lock"),
        (_twice, "bad-lock"),
        (_no_recipe, "bad-lock"),
        (_sidecar_of_an_outputs_name, "bad-lock"),
        (_sidecar_elsewhere, "bad-lock"),
    ],
)
def test_a_lock_that_contradicts_itself(
    out: Path, change: Callable[[Json], None], kind: str
) -> None:
    edit_lock(out, change)
    assert kind in kinds(verify(out))


def test_problems_of_a_lock_have_line_and_column(out: Path) -> None:
    edit_lock(out, _set("/modules/0/scheme", "other"))
    problem = only(verify(out))
    assert problem.file == str(out / LOCK_NAME)
    assert problem.pointer == "/modules/0/scheme"
    lines = (out / LOCK_NAME).read_text().splitlines()
    assert problem.line is not None
    assert '"scheme": "other"' in lines[problem.line - 1]


# Against the source


def test_a_code_that_is_off_by_two_is_named_by_row_and_column(out: Path, source: Path) -> None:
    edit_tensor(out, "a.weight", flip_code(5 * 12 + 7, 2))
    assert verify(out).whole
    found = verify(out, against=source)
    (broken,) = [problem for problem in found.problems if problem.kind == "bound-broken"]
    assert broken.tensor == "a.weight"
    assert broken.file == str(out / "model.safetensors")
    assert "1 element breaks the bound of int8 at row 5, column 7: off by" in broken.message
    assert found.measured[0].of_bound > 1


@given(row=st.integers(0, 7), column=st.integers(0, 11), by=st.sampled_from([-1, 1]))
def test_a_code_that_is_off_by_one_is_found(
    tampered: tuple[Path, Path], row: int, column: int, by: int
) -> None:
    """Off by one is at least half a step off, and a tie at the most just within its bound."""
    source, out = tampered
    kept = {path: path.read_bytes() for path in out.iterdir()}
    edit_tensor(out, "a.weight", flip_code(row * 12 + column, by))
    found = verify(out, against=source)
    for path, content in kept.items():
        path.write_bytes(content)
    broken = [problem for problem in found.problems if problem.kind == "bound-broken"]
    assert len(broken) == 1
    assert broken[0].tensor == "a.weight"
    assert f"row {row}, column {column}" in broken[0].message


@pytest.fixture(scope="module")
def tampered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tampered")
    small(folder / "source" / "m.safetensors")
    convert(parsed(recipe()), folder / "source", folder / "out")
    return folder / "source", folder / "out"


def test_a_scale_that_is_too_small_cannot_hide_behind_clipping(out: Path, source: Path) -> None:
    def halve(payload: bytearray) -> None:
        (scale,) = struct.unpack_from("<f", payload, 0)
        struct.pack_into("<f", payload, 0, scale / 2)

    def clip(payload: bytearray) -> None:
        codes = np.frombuffer(bytes(payload[:12]), np.int8).astype(int) * 2
        payload[:12] = codes.clip(-127, 127).astype(np.int8).tobytes()

    edit_tensor(out, "a.weight_scale", halve)
    edit_tensor(out, "a.weight", clip)
    found = verify(out, against=source)
    (scale,) = [problem for problem in found.problems if problem.kind == "scale-differs"]
    assert scale.tensor == "a.weight_scale"
    assert "[0, 0]" in scale.message
    assert "error-differs" in kinds(found)


@pytest.mark.parametrize(
    ("tensor", "index", "kind", "place"),
    [("norm.weight", 6, "not-a-copy", "[3]"), ("a.bias", 1, "not-a-copy", "[0]")],
)
def test_a_copy_that_was_edited(
    out: Path, source: Path, tensor: str, index: int, kind: str, place: str
) -> None:
    edit_tensor(out, tensor, flip_code(index, 1))
    problem = only(verify(out, against=source))
    assert (problem.kind, problem.tensor) == (kind, tensor)
    assert place in problem.message


def test_a_cast_that_was_edited(tmp_path: Path, source: Path) -> None:
    protected = {"modules": ["a"], "dtype": "float32", "reason": "spikes"}
    convert(parsed(recipe(protected=[protected])), source, tmp_path / "out")
    edit_tensor(tmp_path / "out", "a.weight", flip_code((2 * 12 + 3) * 4, 1))
    problem = only(verify(tmp_path / "out", against=source))
    assert (problem.kind, problem.tensor) == ("not-the-cast", "a.weight")
    assert "row 2, column 3" in problem.message


@pytest.mark.parametrize("field", ["sqnr_db", "max_error_in_scales"])
def test_an_error_that_was_embellished(out: Path, source: Path, field: str) -> None:
    def change(lock: Json) -> None:
        lock["modules"][1]["error"][field] += 0.01 if field == "sqnr_db" else -1e-6
        error = lock["modules"][1]["error"]
        error[field] = round(error[field], 6)

    edit_lock(out, change)
    assert verify(out).whole
    problem = only(verify(out, against=source))
    assert (problem.kind, problem.tensor) == ("error-differs", "b.weight")


def test_another_source_is_told(tmp_path: Path, out: Path, source: Path) -> None:
    tensors = load_file(source / "m.safetensors")
    save_file(tensors, source / "m.safetensors", {"format": "other"})
    problem = only(verify(out, against=source))
    assert problem.kind == "another-source"
    assert "header" in problem.message


def test_another_source_with_the_same_header_is_told_by_its_digest_or_its_numbers(
    out: Path, source: Path
) -> None:
    (source / "m.safetensors").unlink()
    small(source / "m.safetensors", seed=9)
    assert kinds(verify(out, against=source)) == {"another-source"}
    edit_lock(out, lambda lock: lock["source"][0].pop("sha256"))
    assert kinds(verify(out, against=source)) >= {"bound-broken", "not-a-copy"}


def test_a_source_that_is_not_there(tmp_path: Path, out: Path) -> None:
    assert not verify(out, against=tmp_path / "nowhere").whole


def test_a_source_with_more_files_is_another(tmp_path: Path) -> None:
    small(tmp_path / "source" / "m.safetensors")
    layout = {"layout": "plain", "parts": {"model": "*.safetensors"}}
    convert(parsed(recipe() | {"source": layout}), tmp_path / "source", tmp_path / "out")
    save(tmp_path / "source" / "n.safetensors", {"n": torch.ones(2)})
    problem = only(verify(tmp_path / "out", against=tmp_path / "source"))
    assert problem.kind == "another-source"
    assert "'n.safetensors'" in problem.message


# Shards


@pytest.fixture
def shards(tmp_path: Path, source: Path) -> Path:
    made = parsed(recipe(target_fields={"max_shard_size": "100B"}))
    convert(made, source, tmp_path / "shards")
    return tmp_path / "shards"


def test_shards_hold(shards: Path, source: Path) -> None:
    found = verify(shards, against=source)
    assert found.whole
    assert found.files > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["metadata"].update(total_size=1), "size of all tensors"),
        (lambda index: index["weight_map"].pop("a.weight"), "first 'a.weight'"),
        (lambda index: index.pop("weight_map"), "no weight_map"),
    ],
    ids=["size", "entry", "map"],
)
def test_an_index_that_says_otherwise(
    shards: Path, change: Callable[[Json], None], message: str
) -> None:
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    problem = only(verify(shards))
    assert (problem.kind, problem.file) == ("bad-index", str(path))
    assert message in problem.message


def test_a_shard_of_another_conversion(tmp_path: Path, shards: Path, source: Path) -> None:
    made = parsed(recipe(target_fields={"max_shard_size": "100B"}, name="other"))
    convert(made, source, tmp_path / "other")
    shard = "model-00001-of-00004.safetensors"
    shutil.copy(tmp_path / "other" / shard, shards / shard)
    found = verify(shards, quick=True)
    assert "metadata-mismatch" in kinds(found)
    assert {problem.file for problem in found.problems} == {str(shards / shard)}


# Progress


@pytest.mark.parametrize("quick", [False, True])
def test_progress_ends_at_the_workload(out: Path, source: Path, quick: bool) -> None:
    told: list[int] = []
    verify(out, against=source, quick=quick, progress=lambda count, _: told.append(count))
    total = workload(out, against=True, quick=quick)
    header = int.from_bytes((source / "m.safetensors").read_bytes()[:8], "little") + 8
    assert sum(told) == total - header


def test_formats_beyond_int8_name_what_breaks(tmp_path: Path) -> None:
    for fmt in FLOAT8:
        source = tmp_path / fmt / "m.safetensors"
        small(source)
        convert(parsed(recipe(weight_spec(fmt), target=everything())), source, tmp_path / f"o{fmt}")
        edit_tensor(tmp_path / f"o{fmt}", "a.weight", flip_code(14, 128))
        found = verify(tmp_path / f"o{fmt}", against=source)
        (broken,) = [problem for problem in found.problems if problem.kind == "bound-broken"]
        assert f"bound of {fmt} at row 1, column 2" in broken.message


def test_every_tensor_of_a_lock_is_counted(out: Path) -> None:
    lock = json.loads((out / LOCK_NAME).read_text())
    assert verify(out, quick=True).tensors == len(tensors_of(lock))
