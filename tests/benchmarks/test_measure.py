from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import _measure
import pytest


def test_a_failing_command_is_measured_and_its_output_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import sys; print('out'); sys.exit('err')"
    ran = _measure.attempt([sys.executable, "-c", code], log)
    assert ran.exit_status == 1
    assert ran.seconds > 0
    assert ran.peak_rss > 1 << 20
    assert sorted(log.read_text().split()) == ["err", "out"]


def test_a_command_is_killed_at_its_limit(tmp_path: Path) -> None:
    code = "import time; time.sleep(60)"
    ran = _measure.attempt([sys.executable, "-c", code], tmp_path / "log", limit=0.2)
    assert ran.exit_status < 0
    assert ran.seconds < 30


def test_run_refuses_to_go_on_after_a_failure() -> None:
    with pytest.raises(SystemExit, match="exit status 3"):
        _measure.run([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("preallocate", [False, True])
@pytest.mark.parametrize("output_bytes", [1, 999, 1001, 5_000_000])
def test_plain_copy_writes_as_many_bytes_as_asked(
    tmp_path: Path, output_bytes: int, preallocate: bool
) -> None:
    sources = [tmp_path / "a", tmp_path / "b"]
    for path in sources:
        path.write_bytes(bytes(500))
    out = tmp_path / "out"
    assert _measure.plain_copy(sources, out, output_bytes, preallocate) > 0
    assert out.stat().st_size == output_bytes


def test_measuring_never_imports_torch_or_numpy() -> None:
    folder = Path(_measure.__file__).parent
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import curve, limits, peers; "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
