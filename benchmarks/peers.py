"""The same checkpoint through ours and through other programs: seconds, memory, and the result.

    python benchmarks/peers.py --work /a/folder/with/room --setup
    python benchmarks/peers.py --work /a/folder/with/room --scale 0.5 --layers 3

``--setup`` makes an environment for each program, with pinned versions, below ``--work``. Without
it, one branch in the shape of Ideogram 4 is written twice, in bfloat16 and in FP8 with a scale for
each row, and each program makes INT8 with a scale for each output channel of either. Every run is
a fresh process that reads from the disk and not from the page cache; its seconds end when its
output has been flushed to the disk. Then ``peer_check.py``, which has no code of ours, gives the
weights back from the output and compares them with the source's.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _measure import (
    Run,
    attempt,
    files_below,
    flush,
    forget_cached,
    machine,
    note,
    require_disk,
    run,
    total_bytes,
)
from peer_programs import (
    BFLOAT16,
    FP8,
    OURS,
    PART,
    PROGRAMS,
    Program,
    command,
    environment,
    last_error,
    set_up,
    why_not,
)

HERE = Path(__file__).resolve().parent
LAYOUTS = {BFLOAT16: "plain", FP8: "fp8-scaled"}
# Above this an output is not a quantized model: INT8 per channel is off by about 0.01.
WRONG = 0.1


@dataclass(frozen=True, slots=True)
class Result:
    """One program on one source so far.

    Attributes:
        program: which.
        runs: those that ended well.
        failure: why there are no more, in words.
        output_bytes: size of its output.
        verdict: what was found in the output of the first run.
    """

    program: Program
    runs: tuple[Run, ...] = ()
    failure: str | None = None
    output_bytes: int = 0
    verdict: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def peak_rss(self) -> int:
        """The largest."""
        return max(run.peak_rss for run in self.runs)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(), help="folder to work below")
    parser.add_argument("--envs", type=Path, help="the environments (default: WORK/peer-envs)")
    parser.add_argument("--setup", action="store_true", help="make the environments, and stop")
    parser.add_argument("--only", metavar="WORD", default="", help="peers with WORD in their name")
    parser.add_argument("--layers", type=int, default=3, help="of the model")
    parser.add_argument("--scale", type=float, default=0.5, help="width, 1.0 is the real one")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each program")
    parser.add_argument("--limit", type=float, default=3600, help="seconds a run may take")
    options = parser.parse_args()

    envs = (options.envs or options.work / "peer-envs").absolute()
    programs = [each for each in PROGRAMS if options.only in each.name or each is OURS]
    if options.setup:
        set_up(programs, envs)
        return
    require_disk(options.work, estimated_disk(options.scale, options.layers))
    with tempfile.TemporaryDirectory(prefix="peers-", dir=options.work.absolute()) as folder:
        print(f"{machine()}\n", flush=True)
        for dtype in LAYOUTS:
            source = write_source(Path(folder), dtype, options.scale, options.layers)
            chosen = [each for each in programs if dtype in each.sources]
            results = in_turn(chosen, source, envs, options.repeat, options.limit)
            print_table(dtype, total_bytes(files_below(source)), results)
            shutil.rmtree(source)


def write_source(work: Path, dtype: str, scale: float, layers: int) -> Path:
    """Write one branch and return the folder that holds its folder."""
    note(f"writing the source in {dtype}")
    source = work / f"source-{dtype}"
    shape = ["--scale", str(scale), "--layers", str(layers), "--branches", "1", "--dtype", dtype]
    run([sys.executable, HERE / "ideogram4_source.py", source, *shape])
    recipe = {
        "kind": "recipe",
        "version": 1,
        "name": "every-linear-int8",
        "source": {"layout": LAYOUTS[dtype], "parts": {"model": PART}},
        "schemes": {"int8": {"weight": {"format": "int8", "granularity": "channel"}}},
        "rules": [{"modules": ["**"], "scheme": "int8"}],
        "protected": [
            {
                "modules": ["embed_image_indicator"],
                "dtype": "bfloat16",
                "count": 1,
                "reason": "a lookup table",
            }
        ],
        "target": {"layout": "int8-scaled"},
    }
    (source / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    return source


def in_turn(
    programs: list[Program], source: Path, envs: Path, repeat: int, limit: float
) -> list[Result]:
    """Run the programs one after the other, and all of them again, until one fails."""
    results = [Result(each, failure=why_not(each, envs)) for each in programs]
    for turn in range(repeat):
        for place, result in enumerate(results):
            if result.failure is None:
                note(f"{result.program.name}, {turn + 1} of {repeat}")
                results[place] = once_more(result, source, envs, limit)
    return results


def once_more(result: Result, source: Path, envs: Path, limit: float) -> Result:
    """Run a program on a source once, and check what it wrote if that was not done yet."""
    program, verdict, output_bytes = result.program, result.verdict, result.output_bytes
    work = source.parent
    log, out = work / "log.txt", work / "out"
    inputs = files_below(source)
    forget_cached(inputs)
    ran = attempt(command(program, source, out, envs), log, environment(program), limit)
    try:
        if ran.exit_status:
            return replace(result, failure=crash(ran, log, limit))
        ran = replace(ran, seconds=ran.seconds + flush(out))
        if verdict is None:
            output_bytes = total_bytes(files_below(out))
            verdict = checked(program, inputs[0], out, log)
            if verdict is None:
                return replace(result, failure=f"**unreadable**: `{last_error(log)}`")
    finally:
        remove_output(work)
    return Result(program, (*result.runs, ran), None, output_bytes, verdict)


def remove_output(work: Path) -> None:
    """Delete what a program wrote, its own temporary folders included."""
    for folder in work.glob("out*"):
        shutil.rmtree(folder)


def checked(program: Program, source: Path, out: Path, log: Path) -> dict[str, Any] | None:
    """What ``peer_check.py`` says, in a process of its own; None where it cannot read it."""
    arguments: list[str | Path] = [source, out, "--convention", program.convention]
    ran = attempt([sys.executable, HERE / "peer_check.py", *arguments], log)
    if ran.exit_status:
        return None
    verdict: dict[str, Any] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return verdict


def judgement(verdict: dict[str, Any]) -> str:
    """The verdict on an output whose program said that all was well, in words."""
    wrong = not verdict["worst"] <= WRONG  # NaN is wrong too
    faults = list(_faults(verdict))
    if wrong or verdict["missing"]:
        return ", ".join(["**silently wrong**", *faults])
    return ", ".join(["right", *faults])


def _faults(verdict: dict[str, Any]) -> Iterator[str]:
    if verdict["missing"]:
        yield f"{len(verdict['missing'])} tensors missing"
    for dtype, count in verdict["dtypes"].items():
        if dtype != "int8":
            yield f"{count} of {verdict['modules']} linears in {dtype}"
    if verdict["changed"]:
        kinds = sorted({name.rpartition(".")[2] for name in verdict["changed"]})
        yield f"{len(verdict['changed'])} tensors altered ({', '.join(kinds)})"


def crash(ran: Run, log: Path, limit: float) -> str:
    """What became of a run that failed, in words."""
    if ran.exit_status < 0:
        killed = f"killed by signal {-ran.exit_status} after {ran.seconds:.0f} s"
        return f"{killed} (the limit)" if ran.seconds >= limit else killed
    return f"**crashed** (exit {ran.exit_status}): `{last_error(log)}`"


def print_table(dtype: str, source_bytes: int, results: list[Result]) -> None:
    """Print one source's Markdown table."""
    ours = results[0]
    print(f"## {dtype} to int8 per channel, source {source_bytes:,} bytes\n")
    head = ["program", "seconds", "least to most", "to ours", "CPU s", "peak MB", "to ours"]
    head += ["output MB", "error, median", "worst", "result"]
    print(f"| {' | '.join(head)} |")
    print("|---|" + "---:|" * (len(head) - 2) + "---|")
    for result in results:
        print(f"| {' | '.join(row(result, ours, dtype))} |")
    print(flush=True)


def row(result: Result, ours: Result, dtype: str) -> list[str]:
    """The cells of one row."""
    dequantized = dtype == FP8 and result.program.dequantized_by_driver
    name = result.program.name + (" (dequantized for it)" if dequantized else "")
    if result.failure is not None or result.verdict is None:
        return [name, *[""] * 9, result.failure or ""]
    seconds = sorted(each.seconds for each in result.runs)
    return [
        name,
        f"{result.seconds:.1f}",
        f"{seconds[0]:.1f} to {seconds[-1]:.1f}",
        f"{result.seconds / ours.seconds:.1f}" if ours.runs else "",
        f"{statistics.median(each.cpu_seconds for each in result.runs):.1f}",
        f"{result.peak_rss / 1e6:.0f}",
        f"{result.peak_rss / ours.peak_rss:.1f}" if ours.runs else "",
        f"{result.output_bytes / 1e6:.0f}",
        number(result.verdict["median"]),
        number(result.verdict["worst"]),
        judgement(result.verdict),
    ]


def number(error: float) -> str:
    """A relative error, short."""
    return f"{error:.5f}" if math.isfinite(error) and error < WRONG else f"{error:.4g}"


def estimated_disk(scale: float, layers: int) -> int:
    """Bytes to have free: a bfloat16 source, and outputs of twice its numbers to be safe."""
    numbers = (290e6 + 264e6 * layers) * scale**2
    return int(4.2 * numbers) + 500_000_000


if __name__ == "__main__":
    main()
