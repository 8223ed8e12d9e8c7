"""A single flipped bit anywhere in what was written is found."""

from __future__ import annotations

from pathlib import Path

import bit_flips
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantrecipe.checkpoint import read_header
from quantrecipe.evaluate import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bit_flips.Checkpoint:
    return bit_flips.build(tmp_path_factory.mktemp("flips"))


def test_the_checkpoint_holds_before_anything_is_flipped(made: bit_flips.Checkpoint) -> None:
    assert verify(made.out, against=made.source).problems == ()


@settings(max_examples=400)
@given(data=st.data())
def test_every_flip_is_found(made: bit_flips.Checkpoint, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(made.files))
    bit = data.draw(st.integers(0, path.stat().st_size * 8 - 1))
    with bit_flips.flipped(path, bit):
        problems = verify(made.out).problems
    assert str(path) in {problem.file for problem in problems}
    assert all(problem.file is not None for problem in problems)


@settings(max_examples=200)
@given(data=st.data())
def test_a_quick_look_finds_every_flip_outside_of_the_weights(
    made: bit_flips.Checkpoint, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from([p for p in made.files if p.suffix != ".safetensors"]))
    bit = data.draw(st.integers(0, path.stat().st_size * 8 - 1))
    with bit_flips.flipped(path, bit):
        assert not verify(made.out, quick=True).whole


def test_every_kind_of_file_is_flipped(made: bit_flips.Checkpoint) -> None:
    names = {path.name for path in made.files}
    assert names >= {"recipe.json", "recipe.lock.json", "config.json", "tokenizer.json"}
    assert {path.suffixes[-1] for path in made.files} == {".json", ".safetensors"}
    assert any(name.endswith(".index.json") for name in names)


def payload(path: Path) -> int:
    """Where tensors begin."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@given(data=st.data())
def test_a_flip_in_a_payload_names_its_tensor_and_no_other(
    made: bit_flips.Checkpoint, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from([p for p in made.files if p.suffix == ".safetensors"]))
    byte = data.draw(st.integers(payload(path), path.stat().st_size - 1))
    (owner,) = [
        tensor.name
        for tensor in read_header(path).tensors.values()
        if tensor.offset <= byte < tensor.offset + tensor.nbytes
    ]
    with bit_flips.flipped(path, byte * 8 + data.draw(st.integers(0, 7))):
        problems = verify(made.out).problems
        assert verify(made.out, quick=True).whole
    assert {problem.kind for problem in problems} == {"digest-mismatch"}
    assert {problem.file for problem in problems} == {str(path)}
    assert [problem.tensor for problem in problems if problem.tensor] == [owner]


@given(data=st.data())
def test_a_flip_in_a_header_is_found_by_its_digest_at_the_latest(
    made: bit_flips.Checkpoint, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from([p for p in made.files if p.suffix == ".safetensors"]))
    bit = data.draw(st.integers(0, payload(path) * 8 - 1))
    with bit_flips.flipped(path, bit):
        problems = verify(made.out).problems
    assert any(p.kind == "digest-mismatch" and p.tensor is None for p in problems)
