from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.checkpoint.coverage import Coverage


@given(st.integers(0, 30), st.lists(st.tuples(st.integers(-1, 31), st.integers(-1, 31))))
def test_it_knows_what_a_set_of_bytes_knows(size: int, claims: list[tuple[int, int]]) -> None:
    coverage, taken = Coverage(size), set[int]()
    for start, end in claims:
        wanted = set(range(start, end))
        fine = 0 <= start <= end <= size and not wanted & taken
        if fine:
            coverage.claim(start, end)
            taken |= wanted
        else:
            with pytest.raises(ValueError, match="bytes"):
                coverage.claim(start, end)
        assert coverage.missing == size - len(taken)
        assert coverage.complete == (len(taken) == size)
