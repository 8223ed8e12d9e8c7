from __future__ import annotations

import hashlib
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.checkpoint import SourceError, digests, file_sha256, xxh3_128


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
        name: xxhash.xxh3_128(data[start : start + size]).hexdigest()
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


def test_the_digests_that_other_implementations_give() -> None:
    assert xxh3_128(b"") == "99aa06d3014798d86001c324468d497f"
    assert xxh3_128(memoryview(b"a")) == xxh3_128(bytearray(b"a")) == xxh3_128(b"a")


@pytest.mark.parametrize("head", [b"", b"a", b"abc", b"abcdefg"])
def test_what_was_read_before_is_not_read_again(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "x").write_bytes(bytes(len(head)) + b"abcdefg"[len(head) :])
    spans = {"first": (0, 2), "middle": (2, 3), "none": (7, 0)}
    told: list[int] = []
    whole, parts = digests(tmp_path / "x", spans, 3, head=head, progress=told.append)
    assert whole == hashlib.sha256(b"abcdefg").hexdigest()
    assert parts == {"first": xxh3_128(b"ab"), "middle": xxh3_128(b"cde"), "none": xxh3_128(b"")}
    assert sum(told) == 7


def test_progress_and_check_come_with_every_block(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abcdefg")
    told: list[int] = []
    asked: list[int] = []
    digests(tmp_path / "x", {}, 3, progress=told.append, check=lambda: asked.append(len(told)))
    assert told == [3, 3, 1]
    assert asked == [0, 1, 2, 3]


def test_what_a_check_raises_ends_the_work(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abcdefg")
    told: list[int] = []

    def check() -> None:
        if told:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        digests(tmp_path / "x", {}, 3, progress=told.append, check=check)
    assert told == [3]


def test_files_are_hashed_at_the_same_time(tmp_path: Path) -> None:
    """Each waits in the middle for the other, which one alone would wait for in vain."""
    both = threading.Barrier(2, timeout=600)
    data = bytes(1 << 16)
    (tmp_path / "x").write_bytes(data)
    found: list[str] = []

    def wait(_: int) -> None:
        both.wait()

    def one() -> None:
        found.append(digests(tmp_path / "x", {}, 1 << 15, progress=wait)[0])

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [hashlib.sha256(data).hexdigest()] * 2


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        file_sha256(tmp_path / "x")
