"""A single flipped bit anywhere in what was written is found."""

from __future__ import annotations

import re
from pathlib import Path

import bit_flips
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantrecipe.checkpoint import read_header
from quantrecipe.evaluate import verify

# Nothing that is stored says who wrote a checkpoint, so nothing contradicts a lock about it.
UNPROVEN = re.compile(r"/(tool|converter)/(name|version)")
# Of the rest, these follow from the source alone.
WITHOUT_SOURCE = re.compile(rf"{UNPROVEN.pattern}|/source/\d+/\w+|/modules/\d+/error/\w+")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bit_flips.Checkpoint:
    return bit_flips.build(tmp_path_factory.mktemp("flips"))


def is_proven(path: Path, byte: int, pattern: re.Pattern[str]) -> bool:
    if path.name != "recipe.lock.json":
        return True
    field = bit_flips.field_of(path.read_bytes(), byte)
    return field is None or pattern.fullmatch(field) is None


def test_the_checkpoint_holds_before_anything_is_flipped(made: bit_flips.Checkpoint) -> None:
    assert verify(made.out, against=made.source).problems == ()


@settings(max_examples=400)
@given(data=st.data())
def test_every_flip_is_found(made: bit_flips.Checkpoint, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(made.files))
    bit = data.draw(st.integers(0, path.stat().st_size * 8 - 1))
    with bit_flips.flipped(path, bit):
        alone = verify(made.out).problems
        against = alone or verify(made.out, against=made.source).problems
    if not alone:
        assert not is_proven(path, bit // 8, WITHOUT_SOURCE)
    if not against:
        assert not is_proven(path, bit // 8, UNPROVEN)
    for problem in against:
        assert problem.file is not None


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
