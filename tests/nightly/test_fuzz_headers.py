from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).with_name("fuzz_headers.py")


def test_two_thousand_mutated_headers() -> None:
    verdicts = runpy.run_path(str(SCRIPT))["run"](2_000, seed=7)
    assert verdicts.total() == 2_000
    assert verdicts["read"] > 100
    assert verdicts["refused by both"] > 500
    assert verdicts["stricter: duplicate-key"] > 0
