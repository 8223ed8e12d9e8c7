from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.checkpoint import SourceError, digests, file_sha256


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=7), st.integers(1, 64))
def test_files_and_ranges_in_blocks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int], block: int
) -> None:
    path = tmp_path_factory.mktemp("hash") / "x"
    path.write_bytes(data)
    bounds = sorted(min(cut, len(data)) for cut in cuts)
    spans = {
        str(at): (start, end - start)
        for at, (start, end) in enumerate(pairwise(bounds))
        if at % 2 == 0 or start == end
    }
    whole, parts = digests(path, spans, block)
    assert whole == hashlib.sha256(data).hexdigest() == file_sha256(path, block)
    assert parts == {
        name: hashlib.sha256(data[start : start + size]).hexdigest()
        for name, (start, size) in spans.items()
    }


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"a": (0, 2), "b": (1, 2)}, "overlaps"),
        ({"a": (3, 2)}, "beyond the end"),
        ({"a": (5, 0)}, "beyond the end"),
    ],
)
def test_impossible_ranges(tmp_path: Path, spans: dict[str, tuple[int, int]], message: str) -> None:
    (tmp_path / "x").write_bytes(b"abcd")
    with pytest.raises(ValueError, match=message):
        digests(tmp_path / "x", spans)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        file_sha256(tmp_path / "x")
