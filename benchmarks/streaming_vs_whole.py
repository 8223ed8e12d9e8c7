"""The streaming converter against the one that holds whole tensors: seconds and peak memory.

    python benchmarks/streaming_vs_whole.py --work /a/folder/with/room

Converts one branch of 14 layers (4.0 GB of FP8) to INT8 with each converter in turn, several
times, with a warm page cache, and checks that both wrote the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

from _measure import Run, console_script, files_below, machine, require_disk, run, total_bytes

HERE = Path(__file__).resolve().parent
CONVERTERS = ("streaming", "reference")
NEEDED_DISK = 13_000_000_000
RECIPE = {
    "kind": "recipe",
    "version": 1,
    "name": "ideogram-4-branch-int8",
    "source": {"layout": "fp8-scaled", "parts": {"conditional": "transformer"}},
    "schemes": {"int8": {"weight": {"format": "int8", "granularity": "channel"}}},
    "rules": [{"modules": ["**"], "scheme": "int8"}],
    "protected": [
        {
            "modules": ["embed_image_indicator"],
            "dtype": "bfloat16",
            "count": {"min": 0},
            "reason": "a lookup table",
        }
    ],
    "target": {"layout": "int8-scaled"},
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(), help="folder to work below")
    parser.add_argument("--layers", type=int, default=14, help="14 make 4.0 GB")
    parser.add_argument("--scale", type=float, default=1.0, help="width of the model")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each converter")
    options = parser.parse_args()

    require_disk(options.work, NEEDED_DISK)
    with tempfile.TemporaryDirectory(prefix="streaming-", dir=options.work) as folder:
        work = Path(folder)
        shape = ["--scale", str(options.scale), "--layers", str(options.layers), "--branches", "1"]
        run([sys.executable, HERE / "ideogram4_source.py", work / "source", *shape])
        (work / "recipe.json").write_text(json.dumps(RECIPE), encoding="utf-8")
        report(work, options.repeat)


def report(work: Path, repeat: int) -> None:
    """Measure the converters in turn and print the table."""
    runs: dict[str, list[Run]] = {name: [] for name in CONVERTERS}
    digests = set()
    sizes = set()
    for turn in range(repeat):
        for name in CONVERTERS:
            print(f"{name}, {turn + 1} of {repeat}", file=sys.stderr, flush=True)
            out = work / f"out-{name}"
            command: list[str | Path] = [console_script("convert"), work / "source"]
            command += ["--recipe", work / "recipe.json", "--out", out, "--force"]
            runs[name].append(run([*command, "--converter", name]))
            sizes.add(total_bytes(files_below(out)))
            if turn == 0:
                digests.add(digest(files_below(out)))
    source_bytes = total_bytes(files_below(work / "source"))

    print(f"\n{machine()}\n")
    print(f"Source {source_bytes:,} bytes, output {sizes.pop():,} bytes; ", end="")
    print("the same bytes from both.\n" if len(digests) == 1 else "DIFFERENT BYTES.\n")
    print("| converter | seconds, median | least to most | CPU seconds | peak memory |")
    print("|---|---:|---:|---:|---:|")
    for name, measured in runs.items():
        seconds = sorted(each.seconds for each in measured)
        cpu = statistics.median(each.cpu_seconds for each in measured)
        peak = max(each.peak_rss for each in measured)
        print(
            f"| {name} | {statistics.median(seconds):.1f} | {seconds[0]:.1f} to {seconds[-1]:.1f} "
            f"| {cpu:.1f} | {peak / 1e6:.0f} MB |"
        )
    if len(digests) != 1:
        sys.exit("the converters wrote different bytes")


def digest(paths: list[Path]) -> str:
    """One digest over the contents of several files."""
    hashed = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()


if __name__ == "__main__":
    main()
