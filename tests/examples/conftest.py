"""The branches that digits are drawn with, loaded once."""

from __future__ import annotations

import pytest

from denoiser.sampler import Branches


@pytest.fixture(scope="package")
def branches() -> Branches:
    return Branches.load()
