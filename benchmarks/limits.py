"""Conversion against the machine's own limit: 10 GB, from bfloat16 and from FP8, cold and warm.

    python benchmarks/limits.py --work /a/folder/with/room --gigabytes 10

Writes linears in the shapes of Ideogram 4, converts them to INT8 by channel, each time in a process
of its own, and in the same run, in turns with it, reads the same source and writes as many bytes
as the conversion did: into a file that grows, and into one whose blocks were set aside. Everything
is flushed to the disk. Then the stages of one conversion on one thread: CPU seconds for each GB of
source. Prints Markdown tables and deletes everything it made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _measure import (
    EDGE_WEIGHTS,
    LAYER_WEIGHTS,
    console_script,
    files_below,
    flush,
    forget_cached,
    machine,
    note,
    plain_copy,
    require_disk,
    run,
    total_bytes,
)

HERE = Path(__file__).resolve().parent
FP8 = "float8_e4m3fn"
KINDS = {"bfloat16": "plain", FP8: "fp8-scaled"}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(), help="folder to work below")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of each source")
    parser.add_argument("--repeat", type=int, default=2, help="turns for each row")
    parser.add_argument("--dtypes", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    require_disk(options.work, int(2.1e9 * options.gigabytes) + 1_000_000_000)
    print(f"{machine()}\n")
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory(prefix="limits-", dir=options.work) as folder:
            report(Path(folder), dtype, options.gigabytes, options.repeat)


def report(work: Path, dtype: str, gigabytes: float, repeat: int) -> None:
    """Both tables for one kind of source."""
    source, recipe = work / "source", work / "recipe.json"
    size = 2 if dtype == "bfloat16" else 1
    layers = max(1, round((gigabytes * 1e9 / size / 2 - EDGE_WEIGHTS) / LAYER_WEIGHTS))
    arguments = ["--layers", str(layers), "--branches", "2", "--dtype", dtype]
    note(f"writing {dtype}")
    run([sys.executable, HERE / "ideogram4_source.py", source, *arguments])
    recipe.write_text(json.dumps(recipe_for(dtype)), encoding="utf-8")
    inputs = files_below(source)
    source_bytes = total_bytes(inputs)

    rows: dict[str, dict[str, list[float]]] = {}
    output_bytes = 0
    for state in ("cold", "warm"):
        row = rows[state] = {"convert": [], "cpu": [], "peak": [], "growing": [], "set aside": []}
        for turn in range(repeat):
            note(f"{dtype}, {state}, turn {turn + 1} of {repeat}")
            prepare(inputs, state)
            ran = run(
                [console_script("convert"), "--recipe", recipe, source, "--out", work / "out"]
            )
            row["convert"].append(ran.seconds + flush(work / "out"))
            row["cpu"].append(ran.cpu_seconds)
            row["peak"].append(ran.peak_rss / 1e6)
            output_bytes = total_bytes(files_below(work / "out"))
            shutil.rmtree(work / "out")
            for name, preallocate in (("growing", False), ("set aside", True)):
                prepare(inputs, state)
                row[name].append(plain_copy(inputs, work / "copy", output_bytes, preallocate))
                (work / "copy").unlink()
    print(f"{dtype} -> int8 by channel: {source_bytes:,} bytes in, {output_bytes:,} out.\n")
    print_rows(rows)
    note("stages")
    prepare(inputs, "warm")
    stages = [sys.executable, *map(str, (HERE / "stages.py", recipe, source, work / "out"))]
    print(subprocess.run(stages, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(work / "out")


def recipe_for(dtype: str) -> dict[str, object]:
    """Every linear to INT8 by channel, both branches into one file."""
    parts = {"conditional": "transformer", "unconditional": "unconditional_transformer"}
    return {
        "kind": "recipe",
        "version": 1,
        "name": "limits",
        "source": {"layout": KINDS[dtype], "parts": parts},
        "schemes": {"w8": {"weight": {"format": "int8", "granularity": "channel"}}},
        "rules": [{"modules": ["**"], "scheme": "w8"}],
        "protected": [
            {"modules": ["embed_*"], "dtype": "bfloat16", "reason": "looked up, not multiplied"}
        ],
        "target": {"layout": "transformerlab"},
    }


def prepare(inputs: Sequence[Path], state: str) -> None:
    """Drop the source from the page cache, or bring it there."""
    if state == "cold":
        forget_cached(inputs)
        return
    buffer = bytearray(16 << 20)
    for path in inputs:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def print_rows(rows: dict[str, dict[str, list[float]]]) -> None:
    """The Markdown table of medians."""
    print(
        "| source | `convert`, s | plain, growing, s | ratio | set aside, s | ratio | CPU s | MB |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for state, row in rows.items():
        medians = {name: statistics.median(values) for name, values in row.items()}
        whole, growing, aside = (medians[name] for name in ("convert", "growing", "set aside"))
        print(
            f"| {state} | {whole:.1f} | {growing:.1f} | {whole / growing:.2f} | {aside:.1f} "
            f"| {whole / aside:.2f} | {medians['cpu']:.1f} | {max(row['peak']):.0f} |"
        )
    print()


if __name__ == "__main__":
    main()
