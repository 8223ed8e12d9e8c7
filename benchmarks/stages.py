"""CPU seconds of each stage of one conversion, on one thread that works and one that hashes.

    python benchmarks/stages.py RECIPE SOURCE OUT

Times every call of a stage by the clock of its thread. Prints a Markdown table.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from operator import itemgetter
from typing import Any

from quantrecipe.checkpoint import OutputFiles, SourceReader
from quantrecipe.converter import convert, digesting, working
from quantrecipe.converter.protocol import ErrorSums
from quantrecipe.formats.plain_transform import PlainTransform
from quantrecipe.formats.transform import CompiledTransform

SECONDS: defaultdict[str, float] = defaultdict(float)


def timed(owner: Any, name: str, stage: str) -> None:
    """Put a clock around a function."""
    real: Callable[..., Any] = getattr(owner, name)

    def clocked(*arguments: Any, **keywords: Any) -> Any:
        started = time.thread_time()
        try:
            return real(*arguments, **keywords)
        finally:
            SECONDS[stage] += time.thread_time() - started

    setattr(owner, name, clocked)


def main() -> None:
    """Convert with clocks, and print them."""
    recipe, source, out = sys.argv[1:]
    timed(SourceReader, "read_into", "read")
    timed(CompiledTransform, "__call__", "decode, quantize, measure errors")
    timed(PlainTransform, "__call__", "the same in plain torch")
    timed(ErrorSums, "of_blocks", "add errors up")
    timed(OutputFiles, "write", "write")
    timed(OutputFiles, "sync", "flush")
    timed(digesting.SourceDigests, "_hash", "SHA-256 of the source")
    timed(digesting.OutputDigests, "_hash", "SHA-256 and XXH3 of the output")
    timed(working.UnitWorker, "perform", "all of a worker")
    began = time.process_time()
    done = convert(recipe, source, out, jobs=1)
    total = time.process_time() - began
    parts = ("read", "decode, quantize, measure errors", "the same in plain torch", "write")
    SECONDS["everything else of a worker: XXH3, Python"] = SECONDS.pop("all of a worker") - sum(
        SECONDS[part] for part in (*parts, "add errors up")
    )
    SECONDS["plan, lock, publish"] = total - sum(SECONDS.values())
    print("| stage | CPU s | CPU s per GB of source |")
    print("|---|---:|---:|")
    for stage, seconds in [
        *sorted(SECONDS.items(), key=itemgetter(1), reverse=True),
        ("all", total),
    ]:
        if seconds >= 0.005:
            print(f"| {stage} | {seconds:.2f} | {seconds / done.source_bytes * 1e9:.3f} |")


if __name__ == "__main__":
    main()
