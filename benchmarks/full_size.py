"""Convert a full-size Ideogram 4, both branches, and set it beside plain disk traffic.

    python benchmarks/full_size.py --work /a/folder/with/room

Writes the FP8 source (18.6 GB at scale 1), converts it with the command line in a process of its
own, and in the same run reads the same source and writes as many bytes as the conversion did,
twice, each time with cold reads and an fsync. Prints a Markdown table and deletes
everything it made.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from _measure import (
    Run,
    console_script,
    files_below,
    forget_cached,
    machine,
    plain_copy,
    require_disk,
    run,
    total_bytes,
)

HERE = Path(__file__).resolve().parent
BRANCH_BYTES = 9_289_792_888
DEFAULT_RECIPE = "ideogram-4-int8-w8a8"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(), help="folder to work below")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help="a recipe that takes the source")
    parser.add_argument("--scale", type=float, default=1.0, help="width of the model")
    parser.add_argument("--converter", default="streaming")
    options = parser.parse_args()

    # The source, and beside it the output or a copy of as many bytes: at most 1.1 times the source.
    source_estimate = 2 * BRANCH_BYTES * options.scale**2
    require_disk(options.work, int(2.1 * source_estimate) + 1_000_000_000)
    with tempfile.TemporaryDirectory(prefix="full-size-", dir=options.work) as folder:
        report(Path(folder), options.recipe, options.scale, options.converter)


def report(work: Path, recipe: str, scale: float, converter: str) -> None:
    """Generate, measure, print."""
    source, out, copy = work / "source", work / "out", work / "copy.bin"
    note("writing the source")
    generator = HERE / "ideogram4_source.py"
    run([sys.executable, generator, source, "--scale", str(scale)])
    inputs = files_below(source)

    note("converting")
    forget_cached(inputs)
    command: list[str | Path] = [console_script("convert"), source, "--out", out]
    conversion = run([*command, "--recipe", recipe, "--converter", converter])
    outputs = files_below(out)
    output_bytes = total_bytes(outputs)
    sizes = [(path.name, path.stat().st_size) for path in outputs]
    for path in outputs:
        path.unlink()

    plain = []
    for turn in (1, 2):
        note(f"plain reading and writing, {turn} of 2")
        forget_cached(inputs)
        plain.append(plain_copy(inputs, copy, output_bytes))
        copy.unlink()
    print_table(converter, total_bytes(inputs), output_bytes, conversion, plain)
    for name, size in sizes:
        print(f"* `{name}`: {size:,} bytes")


def print_table(
    converter: str, source_bytes: int, output_bytes: int, conversion: Run, plain: list[float]
) -> None:
    """Print the Markdown table."""
    moved = source_bytes + output_bytes
    baseline = min(plain)
    print(f"\n{machine()}\n")
    print(f"Source {source_bytes:,} bytes, output {output_bytes:,} bytes.\n")
    print("| | seconds | GB/s, read and written | against plain | CPU seconds | peak memory |")
    print("|---|---:|---:|---:|---:|---:|")
    for turn, seconds in enumerate(plain, start=1):
        row = f"{seconds:.1f} | {moved / seconds / 1e9:.2f} | {seconds / baseline:.2f} | | 16 MiB"
        print(f"| plain read and write, {turn} | {row} |")
    print(
        f"| `convert`, {converter} | {conversion.seconds:.1f} "
        f"| {moved / conversion.seconds / 1e9:.2f} | {conversion.seconds / baseline:.2f} "
        f"| {conversion.cpu_seconds:.1f} | {conversion.peak_rss / 1e6:.0f} MB |\n"
    )


def note(text: str) -> None:
    """Say what happens, beside the results."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
