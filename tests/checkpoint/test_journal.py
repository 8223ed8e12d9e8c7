"""A journal after a crash, and after damage: what is read is what was written, or less."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.checkpoint import Journal, read_journal
from quantrecipe.schema.problems import OutputError

RECORDS = st.lists(
    st.dictionaries(st.text(), st.none() | st.integers() | st.floats(allow_nan=False) | st.text()),
    max_size=6,
)


def write(path: Path, *batches: Sequence[Any]) -> bytes:
    with closing(Journal(path)) as journal:
        for batch in batches:
            journal.append(batch)
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal")


@given(RECORDS, RECORDS)
def test_what_was_written_is_read(folder: Path, first: list[Any], second: list[Any]) -> None:
    path = folder / "journal"
    path.unlink(missing_ok=True)
    write(path, first, second)
    assert read_journal(path) == first + second


def test_golden_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "j", [{"unit": 1}]) == b'a8c6246e8fd5592e {"unit":1}\n'


@given(RECORDS, RECORDS, st.data())
def test_a_torn_end_is_left_out_and_gone_on_after(
    folder: Path, first: list[Any], second: list[Any], data: st.DataObject
) -> None:
    path = folder / "torn"
    path.unlink(missing_ok=True)
    whole = write(path, first)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = read_journal(path)
    assert kept == first[: len(kept)]
    assert len(kept) >= whole[:cut].count(b"\n")
    write(path, second)
    assert read_journal(path) == kept + second


@given(RECORDS.filter(bool), st.data())
def test_a_flipped_bit_loses_lines_and_changes_none(
    folder: Path, records: list[Any], data: st.DataObject
) -> None:
    path = folder / "flipped"
    path.unlink(missing_ok=True)
    content = bytearray(write(path, records))
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    left = read_journal(path)
    assert all(record in records for record in left)
    # The newline of the last line ends nothing.
    assert len(left) < len(records) or bit // 8 == len(content) - 1


def test_there_may_be_none(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none") == []


def test_one_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Is a directory"):
        Journal(tmp_path)
    with pytest.raises(OutputError, match="Is a directory"):
        read_journal(tmp_path)
