"""Which requests are sent for which ranges."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.checkpoint.hub.ranges import Range, Request, requests_for

POSITIONS = st.integers(0, 400)
RANGES = st.lists(
    st.tuples(st.sampled_from("ab"), POSITIONS, st.integers(0, 90)).map(
        lambda given: Range(given[0], given[1], given[1] + given[2])
    ),
    max_size=30,
)


def positions(ranges: list[Range[str]] | list[Request[str]]) -> list[tuple[str, int]]:
    return [(one.file, place) for one in ranges for place in range(one.start, one.stop)]


@given(RANGES, st.integers(1, 200), st.integers(1, 300), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_all_bytes_come_once_and_little_else(
    ranges: list[Range[str]], request_bytes: int, window_bytes: int, waste: float
) -> None:
    requests = list(
        requests_for(ranges, request_bytes=request_bytes, window_bytes=window_bytes, waste=waste)
    )
    needed, asked = set(positions(ranges)), positions(requests)
    assert needed <= set(asked)
    assert len(asked) == len(set(asked))
    assert len(asked) <= len(needed) * (1 + waste)
    assert all(one.start < one.stop for one in requests)
    assert all(one.stop - one.start <= request_bytes for one in requests)
    # No byte is missing from the counts by which a request is known to be read to its end.
    assert sum(one.needed for one in requests) <= len(needed)


@given(RANGES)
def test_without_waste_nothing_but_what_is_needed_is_asked_for(ranges: list[Range[str]]) -> None:
    requests = list(requests_for(ranges, waste=0.0))
    assert set(positions(requests)) == set(positions(ranges))
    assert all(one.needed == one.stop - one.start for one in requests)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_a_file_that_is_read_through_comes_in_large_requests(sizes: list[int]) -> None:
    ranges, position = list[Range[str]](), 0
    for size in sizes:
        ranges.append(Range("a", position, position + size))
        position += size
    requests = list(requests_for(ranges, request_bytes=100))
    assert len(requests) == -(-position // 100)


def test_neighbours_share_a_request_and_distant_ones_do_not() -> None:
    near = [Range("a", 0, 1000), Range("a", 1004, 2000), Range("a", 9000, 9500)]
    assert [(one.start, one.stop, one.needed) for one in requests_for(near)] == [
        (0, 2000, 1996),
        (9000, 9500, 500),
    ]


def test_a_gap_that_was_asked_for_before_is_not_bridged() -> None:
    ranges = [Range("a", 100, 101), Range("a", 0, 100), Range("a", 101, 200)]
    requests = list(requests_for(ranges, window_bytes=1, waste=1.0))
    assert [(one.start, one.stop) for one in requests] == [(100, 101), (0, 100), (101, 200)]
