"""Time and memory of converting an Ideogram 4, cut to several sizes, beside plain disk traffic.

    python benchmarks/curve.py --work /a/folder/with/room --sizes 0.5 1 2 4 9.3 18.6

For each size in GB: writes an FP8 source of about that size, real shapes, fewer layers or one
branch; converts it to INT8 by the recipe ``ideogram-4-int8-w8a8``, cut to what is there; and in
the same run reads the same source and writes as many bytes as the conversion did, once into a file
that grows and once into one whose blocks were set aside. Each conversion is a fresh process; reads
are cold, writes are flushed. Prints a Markdown table and deletes everything it made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _measure import (
    EDGE_WEIGHTS,
    LAYER_WEIGHTS,
    Run,
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
RECIPE = HERE.parent / "quantrecipe" / "recipes" / "ideogram-4-int8-w8a8.json"
SIZES = (0.5, 1.0, 2.0, 4.0, 9.3, 18.6)
ALL_LAYERS = 34
# The output's size over the source's where the text projection, kept in bfloat16, is most of it.
LARGEST_RATIO = 1.6


@dataclass(frozen=True, slots=True)
class Shape:
    """How much of the model is written."""

    branches: int
    layers: int
    scale: float = 1.0

    @property
    def source_bytes(self) -> int:
        """About the size of its FP8 files, a byte for each weight."""
        return int(self.branches * (EDGE_WEIGHTS + self.layers * LAYER_WEIGHTS) * self.scale**2)


def shape_for(size: float) -> Shape:
    """The shape whose FP8 source comes nearest to ``size`` bytes.

    Real widths where a layer of them fits, a narrower layer below; one branch while one will do.
    """
    one = Shape(1, 1)
    if size < 0.75 * one.source_bytes:
        return Shape(1, 1, (size / one.source_bytes) ** 0.5)
    shapes = [Shape(branches, layers) for branches in (1, 2) for layers in range(1, ALL_LAYERS + 1)]
    return min(shapes, key=lambda shape: abs(shape.source_bytes - size))


def cut(recipe: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """The recipe for fewer layers or one branch: no counts, and only the parts that are there."""
    parts = dict(list(recipe["source"]["parts"].items())[: shape.branches])
    entries = {
        key: [
            {name: value for name, value in entry.items() if name != "count"}
            for entry in recipe[key]
            if not entry.get("parts") or set(entry["parts"]) & set(parts)
        ]
        for key in ("rules", "protected")
    }
    return {**recipe, **entries, "source": {**recipe["source"], "parts": parts}}


@dataclass(frozen=True, slots=True)
class Point:
    """What was measured at one size; seconds are of each turn."""

    source_bytes: int
    output_bytes: int
    conversions: tuple[Run, ...]
    growing: tuple[float, ...]
    preallocated: tuple[float, ...]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(), help="folder to work below")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, metavar="GB")
    parser.add_argument("--repeat", type=int, default=1, help="turns at each size")
    options = parser.parse_args()

    shapes = [shape_for(size * 1e9) for size in options.sizes]
    largest = max(shape.source_bytes for shape in shapes)
    require_disk(options.work, int((1 + LARGEST_RATIO) * largest) + 1_000_000_000)
    points = []
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="curve-", dir=options.work) as folder:
            points.append(measure(Path(folder), shape, options.repeat))
    print_table(points)


def measure(work: Path, shape: Shape, repeat: int) -> Point:
    """Write a source of one shape, convert it and copy it."""
    note(f"writing a source of about {shape.source_bytes / 1e9:.1f} GB")
    source, out, copy = work / "source", work / "out", work / "copy.bin"
    arguments = ["--branches", shape.branches, "--layers", shape.layers, "--scale", shape.scale]
    run([sys.executable, HERE / "ideogram4_source.py", source, *map(str, arguments)])
    inputs = files_below(source)
    recipe = work / "recipe.json"
    cut_recipe = cut(json.loads(RECIPE.read_text(encoding="utf-8")), shape)
    recipe.write_text(json.dumps(cut_recipe), encoding="utf-8")

    conversions: list[Run] = []
    growing: list[float] = []
    preallocated: list[float] = []
    for turn in range(repeat):
        note(f"turn {turn + 1} of {repeat}")
        forget_cached(inputs)
        ran = run([console_script("convert"), source, "--out", out, "--recipe", recipe])
        conversions.append(replace(ran, seconds=ran.seconds + flush(out)))
        output_bytes = total_bytes(files_below(out))
        shutil.rmtree(out)
        for preallocate, seconds in ((False, growing), (True, preallocated)):
            forget_cached(inputs)
            seconds.append(plain_copy(inputs, copy, output_bytes, preallocate))
            copy.unlink()
    return Point(
        total_bytes(inputs), output_bytes, tuple(conversions), tuple(growing), tuple(preallocated)
    )


def print_table(points: list[Point]) -> None:
    """Print the Markdown table, medians of the turns."""
    print(f"\n{machine()}\n")
    head = ["source bytes", "output bytes", "`convert`, s", "s per GB of source"]
    head += ["plain, growing, s", "ratio", "plain, preallocated, s", "ratio", "CPU s", "peak MB"]
    print(f"| {' | '.join(head)} |")
    print("|" + "---:|" * len(head))
    for point in points:
        seconds = statistics.median(ran.seconds for ran in point.conversions)
        growing = statistics.median(point.growing)
        preallocated = statistics.median(point.preallocated)
        cells = [
            f"{point.source_bytes:,}",
            f"{point.output_bytes:,}",
            f"{seconds:.1f}",
            f"{seconds / point.source_bytes * 1e9:.2f}",
            f"{growing:.1f}",
            f"{seconds / growing:.2f}",
            f"{preallocated:.1f}",
            f"{seconds / preallocated:.2f}",
            f"{statistics.median(ran.cpu_seconds for ran in point.conversions):.1f}",
            f"{max(ran.peak_rss for ran in point.conversions) / 1e6:.0f}",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
