from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peer_programs
import peers
import pytest
from _measure import Run

GOOD: dict[str, Any] = {
    "modules": 2,
    "dtypes": {"int8": 2},
    "missing": [],
    "changed": [],
    "median": 0.008,
    "worst": 0.009,
    "worst_module": "a",
}


@pytest.mark.parametrize(
    ("difference", "outcome"),
    [
        pytest.param({}, "right", id="right"),
        pytest.param({"worst": 4712.2}, "**silently wrong**", id="far off"),
        pytest.param({"worst": math.nan}, "**silently wrong**", id="not a number"),
        pytest.param(
            {"missing": ["a.weight"]}, "**silently wrong**, 1 tensors missing", id="missing"
        ),
        pytest.param(
            {"dtypes": {"int8": 1, "bfloat16": 1}}, "right, 1 of 2 linears in bfloat16", id="kept"
        ),
        pytest.param(
            {"changed": ["a.bias", "b.bias"]}, "right, 2 tensors altered (bias)", id="altered"
        ),
    ],
)
def test_judgement(difference: dict[str, Any], outcome: str) -> None:
    assert peers.judgement({**GOOD, **difference}) == outcome


@pytest.mark.parametrize(
    ("log", "line"),
    [
        pytest.param("Traceback\n  File x\nValueError: bad | worse\n\n", "ValueError: bad / worse"),
        pytest.param("torch.cuda.OutOfMemoryError: 3\nbye\n", "torch.cuda.OutOfMemoryError: 3"),
        pytest.param("10%\r20%\rRuntimeError: size\r", "RuntimeError: size"),
        pytest.param("ERROR: No matching distribution\n", "ERROR: No matching", id="pip"),
        pytest.param("something\nelse\n", "else"),
        pytest.param("", "no output", id="nothing"),
    ],
)
def test_last_error(tmp_path: Path, log: str, line: str) -> None:
    path = tmp_path / "log"
    path.write_text(log, newline="")
    assert peer_programs.last_error(path).startswith(line)


def test_crash_names_status_or_signal(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("KeyError: 'x'\n")
    crashed = peers.crash(Run(2.0, 1.0, 0, exit_status=1), log, limit=9)
    assert crashed == "**crashed** (exit 1): `KeyError: 'x'`"
    assert "signal 9 after 2 s" in peers.crash(Run(2.0, 1.0, 0, exit_status=-9), log, limit=9)
    assert "(the limit)" in peers.crash(Run(9.1, 1.0, 0, exit_status=-9), log, limit=9)


def test_a_program_without_an_environment_says_so(tmp_path: Path) -> None:
    program = peer_programs.PROGRAMS[1]
    assert peer_programs.why_not(peer_programs.OURS, tmp_path) is None
    assert peer_programs.why_not(program, tmp_path) == "not installed: no --setup yet"
    folder = tmp_path / program.environment
    folder.mkdir()
    (folder / "setup.log").write_text("ERROR: no such version\n")
    assert peer_programs.why_not(program, tmp_path) == "not installed: ERROR: no such version"
    peer_programs.ready(folder).touch()
    assert peer_programs.why_not(program, tmp_path) is None
