"""What the tests of the planner share: sources made of headers alone, and Ideogram 4's tensors."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).parents[1]


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def headers() -> ModuleType:
    return load("quantrecipe_tests_headers", TESTS / "support" / "headers.py")


@pytest.fixture(scope="session")
def ideogram4() -> ModuleType:
    return load("quantrecipe_tests_ideogram4", TESTS / "recipes" / "ideogram4_tensors.py")
