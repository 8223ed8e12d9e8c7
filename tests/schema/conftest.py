"""What the tests of the planner share: sources made of headers alone, and Ideogram 4's tensors."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def headers() -> ModuleType:
    return importlib.import_module("tests.support.headers")


@pytest.fixture(scope="session")
def ideogram4() -> ModuleType:
    return importlib.import_module("tests.recipes.ideogram4_tensors")
