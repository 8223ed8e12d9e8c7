"""A short run of the nightly fuzzer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent.parent / "nightly" / "fuzz_recipes.py"


def _fuzzer() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz_recipes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_recipes"] = module
    spec.loader.exec_module(module)
    return module


def test_two_thousand_mutated_recipes_raise_only_what_they_may() -> None:
    tally = _fuzzer().fuzz(2_000, seed=0)
    assert sum(tally.outcomes.values()) == 2_000
    assert tally.outcomes["valid"] > 20
    assert len(tally.kinds) > 30
