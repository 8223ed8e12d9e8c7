"""Addresses of repositories."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantrecipe.schema.address import HubAddress, is_address, parse_address
from quantrecipe.schema.base import REPOSITORY, REVISION
from quantrecipe.schema.problems import InvalidInput

NAMES = st.from_regex(re.compile(REPOSITORY), fullmatch=True).filter(
    lambda name: name.split("/")[0] not in ("datasets", "spaces", "buckets")
)
REVISIONS = st.none() | st.from_regex(re.compile(REVISION), fullmatch=True).filter(
    lambda text: not text.endswith("\n")
)
SEGMENTS = st.text("abcXYZ019 ._-@[]*", min_size=1).filter(lambda text: text.strip("."))
BELOW = st.just(".") | st.lists(SEGMENTS, min_size=1, max_size=3).map("/".join)


@given(NAMES.map(str.strip), REVISIONS, BELOW)
def test_what_is_written_is_read_again(repo: str, revision: str | None, below: str) -> None:
    address = HubAddress(repo, revision, below)
    assert is_address(str(address))
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://o/n", HubAddress("o/n")),
        ("hf://o/n/", HubAddress("o/n")),
        ("hf://o/n@main", HubAddress("o/n", "main")),
        ("hf://o/n@v1.0/sub/m.safetensors", HubAddress("o/n", "v1.0", "sub/m.safetensors")),
        ("hf://o/n@refs/pr/3/sub", HubAddress("o/n", "refs/pr/3", "sub")),
        ("hf://o/n@my%2Fbranch", HubAddress("o/n", "my/branch")),
        ("hf://o/n/a@b", HubAddress("o/n", None, "a@b")),
    ],
)
def test_addresses(text: str, address: HubAddress) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://o",
        "hf:/o/n",
        "o/n",
        "hf:///n",
        "hf://o/n@",
        "hf://o/n@-x",
        "hf://o n/m",
        "hf://datasets/n",
        "hf://o/n/../x",
        "hf://o/n/a//b",
        "hf://o/n@main/./b",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_address(text)
    (problem,) = caught.value.problems
    assert problem.kind == "bad-address"
    assert problem.file == text
    assert problem.hint is not None
    assert "hf://owner/name" in problem.hint
