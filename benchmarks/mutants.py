"""Mutation testing of the numeric formats: every mutant of the arithmetic must fail a test.

Each mutant changes one expression in a temporary copy of the package, and the tests of the formats
run against that copy. ``python benchmarks/mutants.py`` prints ``killed`` or ``SURVIVED`` for each
and exits with 1 if any survived. ``--only WORD`` runs the mutants with WORD in their name.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: ``old`` occurs exactly once in ``quantrecipe/formats/<file>``."""

    name: str
    file: str
    old: str
    new: str


_CLAMP: Final = "ratio.clamp_(-self.largest_code, self.largest_code)"

MUTANTS: Final = (
    Mutant("int8: round down", "int8.py", "ratio.round_()", "ratio.floor_()"),
    Mutant("int8: truncate", "int8.py", "ratio.round_()", "ratio.trunc_()"),
    Mutant("int8: ties upwards", "int8.py", "ratio.round_()", "ratio.add_(0.5).floor_()"),
    Mutant(
        "int8: ties away from zero",
        "int8.py",
        "ratio.round_()",
        "ratio.copy_((ratio.abs() + 0.5).floor() * ratio.sign())",
    ),
    Mutant("int8: no rounding", "int8.py", "ratio.round_()", "ratio"),
    Mutant("int8: lower limit -128", "int8.py", "clamp_(-_LARGEST,", "clamp_(-128,"),
    Mutant("int8: upper limit 126", "int8.py", ", _LARGEST)", ", 126)"),
    Mutant("int8: upper limit 128", "int8.py", ", _LARGEST)", ", 128)"),
    Mutant("int8: no clamp", "int8.py", ".clamp_(-_LARGEST, _LARGEST)", ""),
    Mutant("int8: clamp before rounding, at 126.5", "int8.py", ", _LARGEST)", ", 126.5).round_()"),
    Mutant("int8: scale amax / 127.5", "int8.py", "float(_LARGEST)", "127.5"),
    Mutant("int8: scale amax / 128", "int8.py", "float(_LARGEST)", "128.0"),
    Mutant("int8: bound without clipping", "int8.py", "clipped, scale / 2", "scale / 2, scale / 2"),
    Mutant("int8: bound twice as loose", "int8.py", "clipped, scale / 2", "clipped, scale"),
    Mutant(
        "scale: multiplied by the reciprocal",
        "scaled.py",
        "torch.div(amax, divisor)",
        "(amax * (1 / divisor))",
    ),
    Mutant(
        "scale: no floor",
        "scaled.py",
        ".clamp_(min=torch.finfo(dtype).smallest_normal)",
        "",
    ),
    Mutant(
        "scale: floor at float32's smallest normal",
        "scaled.py",
        "torch.finfo(dtype).smallest_normal",
        "torch.finfo(torch.float32).smallest_normal",
    ),
    Mutant(
        "scale: floor at the smallest subnormal",
        "scaled.py",
        "torch.finfo(dtype).smallest_normal",
        "(2.0**-149 if dtype == torch.float32 else 2.0**-24)",
    ),
    Mutant(
        "scale: zero group gets 0",
        "scaled.py",
        "masked_fill_(amax == 0, 1.0)",
        "masked_fill_(amax == 0, 0.0)",
    ),
    Mutant("scale: zero group gets the floor", "scaled.py", ".masked_fill_(amax == 0, 1.0)", ""),
    Mutant("scale: overflow accepted", "scaled.py", "if not all_finite(stored):", "if False:"),
    Mutant(
        "codes: multiplied by the reciprocal",
        "scaled.py",
        "torch.div(w, s, out=target)",
        "torch.mul(w, 1 / s, out=target)",
    ),
    Mutant(
        "codes: from the unrounded scale",
        "scaled.py",
        "torch.div(w, s, out=target)",
        "torch.div(w, w.abs().amax((1, 3), True).div(self.largest_code).clamp_(min=2**-126)"
        ", out=target)",
    ),
    Mutant(
        "codes: arithmetic in bfloat16",
        "scaled.py",
        "torch.div(w, s, out=target)",
        "target.copy_(w.bfloat16() / s.bfloat16())",
    ),
    Mutant(
        "codes: scale may be zero", "scaled.py", "if not 0 < float(low)", "if not 0 <= float(low)"
    ),
    Mutant("decode: divides", "scaled.py", "view.mul_(s)", "view.div_(s)"),
    Mutant("decode: broken scales accepted", "scaled.py", "refuse_non_finite(values)", "pass"),
    Mutant("measure: non-finite accepted", "scaled.py", "refuse_non_finite(weight)", "pass"),
    Mutant("absmax: only the largest", "grid.py", "low.amin(2).neg_()", "high.amax(2)"),
    Mutant("absmax: only the smallest", "grid.py", "maximum(high.amax(2)", "maximum(-low.amin(2)"),
    Mutant("absmax: signed", "grid.py", "low.amin(2).neg_()", "low.amin(2)"),
    Mutant("grid: last groups dropped", "grid.py", "if whole < length:", "if not whole:"),
    Mutant("fp8: no clamp", "float8.py", _CLAMP, "pass"),
    Mutant("fp8: only a lower clamp", "float8.py", _CLAMP, "ratio.clamp_(min=-self.largest_code)"),
    Mutant(
        "fp8: clamp half a step low", "float8.py", _CLAMP, _CLAMP.replace("code", "code * 0.96")
    ),
    Mutant(
        "fp8: rounded to integers first", "float8.py", "ratio.clamp_(", "ratio.round_().clamp_("
    ),
    Mutant(
        "fp8: largest code 240",
        "float8.py",
        "self.largest_code = info.max",
        "self.largest_code = 240.0",
    ),
    Mutant("fp8: NaN codes accepted", "float8.py", "refuse_codes(codes, codes.float())", "pass"),
    Mutant("fp8: negative NaN codes accepted", "float8.py", "max(positive, negative)", "positive"),
    Mutant("fp8: positive NaN codes accepted", "float8.py", "max(positive, negative)", "negative"),
    Mutant(
        "fp8: exponent bias off by one", "float8.py", "out.mul_(2.0**120)", "out.mul_(2.0**121)"
    ),
    Mutant("fp8: sign lost", "float8.py", "-0x78100000", "0x07F00000"),
    Mutant(
        "fp8: bound for one mantissa bit less",
        "float8.py",
        "(self._mantissa + 1) + 1",
        "self._mantissa + 1",
    ),
    Mutant("plain: overflow accepted", "plain.py", "refuse_cast(source, result)", "pass"),
    Mutant(
        "plain: float64 not through its float32", "plain.py", "source.float()", "source / 1.001"
    ),
    Mutant("plain: a copy that looks", "plain.py", "if source.dtype == target:", "if False:"),
    Mutant("error: noise of the codes", "error.py", "error.sub_(weight)", "error.add_(weight)"),
    Mutant(
        "error: no float64 for extremes",
        "error.py",
        "if float(low) < _SAFE_NORM[0]",
        "if False and float(low) < 0",
    ),
    Mutant(
        "error: float32 for extremes", "error.py", ".cumsum(1)[:, -1]", ".float().sum(1).double()"
    ),
    Mutant("error: worst not in scales", "error.py", ".div_(scale).amax()", ".amax()"),
)


def main() -> int:
    """Run the mutants; the number of survivors decides the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", metavar="WORD", default="", help="those with WORD in their name")
    chosen = [mutant for mutant in MUTANTS if parser.parse_args().only in mutant.name]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder)
        _copy(copy)
        if not _tests_pass(copy):
            print("the tests fail without any mutation", file=sys.stderr)
            return 1
        survivors = [mutant for mutant in chosen if not _killed(copy, mutant)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    return 1 if survivors else 0


def _copy(target: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
    shutil.copytree(ROOT / "quantrecipe", target / "quantrecipe", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "formats", target / "tests" / "formats", ignore=ignore)
    shutil.copy(ROOT / "tests" / "conftest.py", target / "tests")


def _killed(copy: Path, mutant: Mutant) -> bool:
    path = copy / "quantrecipe" / "formats" / mutant.file
    original = path.read_text()
    if original.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.old!r} is not in {mutant.file} exactly once")
    path.write_text(original.replace(mutant.old, mutant.new))
    began = time.monotonic()
    try:
        survived = _tests_pass(copy)
    finally:
        path.write_text(original)
    word = "SURVIVED" if survived else "killed"
    print(f"{word:8}  {time.monotonic() - began:5.1f} s  {mutant.name}", flush=True)
    return not survived


def _tests_pass(copy: Path) -> bool:
    """Whether pytest passes; a run that could not test at all is an error, not a kill."""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "--import-mode=importlib"]
    # Tables of cases are quick and kill most mutants; properties follow.
    files = sorted(copy.glob("tests/formats/test_*.py"), key=lambda path: "edges" not in path.name)
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", *map(str, files)],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode not in (0, 1):
        raise SystemExit(run.stdout + run.stderr)
    return run.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
