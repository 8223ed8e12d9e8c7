"""Small real clusters, one of each kind for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor

import pytest

from quantrecipe.converter.executors import open_executor

MODULES = {"ray": "ray", "dask": "distributed"}
# A cluster belongs to one process of the test run.
CLUSTERS = [
    pytest.param(kind, marks=pytest.mark.xdist_group(f"cluster-{kind}")) for kind in MODULES
]


@pytest.fixture(scope="session", params=CLUSTERS)
def cluster(request: pytest.FixtureRequest) -> Iterator[Executor]:
    pytest.importorskip(MODULES[request.param])
    with open_executor(request.param, jobs=2) as executor:
        yield executor
