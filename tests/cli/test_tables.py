"""Tables line up, sizes are short."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.cli.tables import human_bytes, human_count, table

CELLS = st.text(st.characters(exclude_characters=" "), max_size=8)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=6))
def test_every_row_is_one_line_without_trailing_space(rows: list[tuple[str, str, str]]) -> None:
    lines = table(rows, ("A", "B", "C"), "lrl").split("\n")
    assert len(lines) == len(rows) + 1
    assert all(line == line.rstrip() for line in lines)
    assert all(character.isprintable() for line in lines for character in line)


def test_columns_are_aligned_as_asked() -> None:
    found = table([("a", 1, "x"), ("long", 1000, "yy")], ("NAME", "N", "LAST"), "lrr")
    assert found == "NAME     N  LAST\na        1     x\nlong  1000    yy"


def test_a_table_may_be_empty_and_never_ragged() -> None:
    assert table([]) == ""
    assert table([], ("A",)) == "A"
    with pytest.raises(ValueError, match="differ"):
        table([(1, 2)], ("A",))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (999_499, "999 KB"),
        (999_500, "1.00 MB"),
        (9_289_792_888, "9.29 GB"),
        (20_400_000_000, "20.4 GB"),
        (10**19, "10000 PB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_human_count() -> None:
    assert [human_count(n) for n in (7, 1500, 9_279_288_448)] == ["7", "1.50 K", "9.28 B"]
