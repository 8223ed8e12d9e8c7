"""Three processes measure what one would have measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

from quantrecipe.converter.calibration import open_statistics
from tests.converter.calibration import processes
from tests.converter.calibration.test_sums import assert_alike
from tests.converter.making import recipe

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and hasattr(os, "fork")),
    reason="torch without processes, or a system that cannot fork",
)


def test_several_processes_are_as_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(recipe()))
    ran = subprocess.run(
        [sys.executable, processes.__file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    whole = processes.measure(range(processes.ROWS))
    header = whole.header()
    assert header.siblings == {"model": (("a", "b"),)}
    assert len(header.folds) == 1
    for rank in range(processes.PROCESSES):
        with open_statistics(tmp_path / f"{rank}.safetensors") as file:
            assert file.header == header
            for (part, name), expected in whole.statistics():
                assert_alike(file.module(part, name), expected)
        refusal = (tmp_path / f"{rank}.txt").read_text()
        assert "only one of them has 'a' of part 'model'" in refusal
    assert ran.stdout.count("spikiest") == 1
    with open_statistics(tmp_path / "command.safetensors") as file:
        tokens = file.module("model", "a").tokens
        assert tokens is not None
        assert tokens.tolist() == [processes.ROWS]
        assert file.header.samples == processes.ROWS
