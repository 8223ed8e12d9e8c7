"""Edit distances against their definition and another package, and files of texts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.evaluate.metrics import texts
from quantrecipe.evaluate.metrics.texts import (
    ExactMatch,
    NormalizedEditDistance,
    edit_distance,
    normalized_edit_distance,
)
from quantrecipe.schema.problems import InvalidInput

TEXTS = st.text(st.sampled_from("abcÄ\U0001f600"), max_size=12)


def by_definition(one: str, other: str) -> int:
    @cache
    def apart(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = apart(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(replaced, apart(i - 1, j) + 1, apart(i, j - 1) + 1)

    return apart(len(one), len(other))


@given(TEXTS, TEXTS)
def test_it_is_the_least_number_of_edits(one: str, other: str) -> None:
    assert edit_distance(one, other) == by_definition(one, other)


@given(st.text(max_size=200), st.text(max_size=200))
def test_another_package_counts_the_same(one: str, other: str) -> None:
    theirs = pytest.importorskip("rapidfuzz.distance")
    assert edit_distance(one, other) == theirs.Levenshtein.distance(one, other)
    assert normalized_edit_distance(one, other) == pytest.approx(
        theirs.Levenshtein.normalized_distance(one, other)
    )


@given(TEXTS, TEXTS, TEXTS)
def test_it_is_a_distance(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("kitten", "sitting", 3 / 7),
        ("", "", 0.0),
        ("", "abc", 1.0),
        ("same", "same", 0.0),
        ("OPEN DAILY", "0PEN DALY", 0.2),
    ],
)
def test_distances_by_hand(one: str, other: str, expected: float) -> None:
    assert normalized_edit_distance(one, other) == pytest.approx(expected)


def test_files(tmp_path: Path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("kitten\n", "utf-8")
    b.write_text("  kitten", "utf-8")
    assert ExactMatch().score(a, b) == 1
    b.write_text("sitting", "utf-8")
    assert ExactMatch().score(a, b) == 0
    assert NormalizedEditDistance().score(a, b) == pytest.approx(3 / 7)


def test_what_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff")
    monkeypatch.setattr(texts, "MOST_BYTES", 4)
    kinds = []
    for content in (b"\xff", b"12345", None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(InvalidInput) as caught:
            ExactMatch().score(path, path)
        kinds += [problem.kind for problem in caught.value.problems]
    assert kinds == ["not-utf-8", "too-large", "unreadable"]
