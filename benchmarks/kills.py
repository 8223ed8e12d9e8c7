"""Kill conversions with SIGKILL at random moments, go on each time, and compare the results.

    python benchmarks/kills.py --count 300
    python benchmarks/kills.py --executor dask --count 30

A conversion runs in a process of its own and is killed after a random time; the next one goes on
from what it left, and is killed in turn, until one comes to its end. Its files must be those of a
conversion that nobody disturbed. Then the next round begins, until there were as many kills as
asked for.

With ``--executor ray`` or ``dask`` it is a worker of a small local cluster that is killed, one in
every conversion, and the conversion goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from concurrent.futures import Executor
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from safetensors.torch import save_file

from quantrecipe.converter import Means, carry_out, find_converter, plan, working
from quantrecipe.converter.executors import open_executor
from quantrecipe.schema.validation import parse_recipe

RECIPE: dict[str, Any] = {
    "kind": "recipe",
    "version": 1,
    "name": "killed",
    "source": {"layout": "plain"},
    "schemes": {"w8": {"weight": {"format": "int8", "granularity": "channel"}}},
    "rules": [{"modules": ["**"], "scheme": "w8"}],
    "target": {"layout": "int8-scaled", "max_shard_size": "12MB"},
}


WHOLE = "came to its end"


def main() -> None:
    """Kill, go on, compare, and print what happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder to work below")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--executor", choices=["ray", "dask"])
    options = parser.parse_args()
    chosen = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kills-", dir=options.work) as folder:
        work = Path(folder)
        if options.executor is None:
            raise SystemExit(kill_many(work, options.count, chosen))
        raise SystemExit(kill_workers(work, options.executor, options.count, chosen))


def kill_many(work: Path, count: int, chosen: random.Random) -> int:
    """Kill ``count`` times; returns how many rounds ended with other bytes."""
    source, out = work / "source", work / "out"
    write_source(source)
    started = time.monotonic()
    convert(source, work / "undisturbed")
    seconds = time.monotonic() - started
    expected = tree(work / "undisturbed")
    ends: Counter[str] = Counter()
    rounds = wrong = 0
    while killed(ends) < count:
        while killed(ends) < count and not (out / "recipe.lock.json").exists():
            ends[kill_one(source, out, chosen.uniform(0, 1.2 * seconds))] += 1
        if not (out / "recipe.lock.json").exists():
            convert(source, out)
        rounds += 1
        if tree(out) != expected:
            wrong += 1
            print(f"round {rounds}: other bytes")
        shutil.rmtree(out)
    print(
        f"{killed(ends)} kills in {rounds} rounds, {wrong} of them with other bytes "
        f"({time.monotonic() - started:.0f} s; undisturbed {seconds:.2f} s)"
    )
    for what, number in ends.most_common():
        print(f"{number:6,}  {what}")
    return wrong


def killed(ends: Counter[str]) -> int:
    """How many were killed before they came to their end."""
    return ends.total() - ends[WHOLE]


def kill_one(source: Path, out: Path, seconds: float) -> str:
    """Start or go on, and kill after a while; says what it was killed in."""
    child = os.fork()
    if child == 0:
        try:
            convert(source, out)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return WHOLE
    partial = out.with_name("out.partial")
    if out.exists():
        return "killed after publishing"
    if not partial.exists():
        return "killed before anything was there"
    journal = partial / "journal"
    if not journal.exists() or not journal.stat().st_size:
        return "killed before anything was done"
    return "killed in the middle"


def kill_workers(work: Path, kind: str, count: int, chosen: random.Random) -> int:
    """Kill a worker in each of ``count`` conversions; returns how many ended with other bytes."""
    source, out = work / "source", work / "out"
    write_source(source)
    convert(source, work / "undisturbed")
    expected = tree(work / "undisturbed")
    wrong = hit = 0
    # Small pieces, so that there is something left to do when a worker is gone.
    working.ASSIGNMENT_BYTES = 2 << 20  # type: ignore[misc]
    started = time.monotonic()
    with open_executor(kind, 2) as executor:
        convert(source, out, executor)
        shutil.rmtree(out)
        began = time.monotonic()
        convert(source, out, executor)
        seconds = time.monotonic() - began
        shutil.rmtree(out)
        for turn in range(count):
            victim = executor.submit(os.getpid).result()
            killer = Timer(chosen.uniform(0, seconds), os.kill, (victim, signal.SIGKILL))
            killer.start()
            convert(source, out, executor)
            hit += not killer.is_alive()
            killer.join()
            if tree(out) != expected:
                wrong += 1
                print(f"turn {turn + 1}: other bytes")
            shutil.rmtree(out)
    print(
        f"{kind}: a worker killed in each of {count} conversions, {hit} times before its end; "
        f"{wrong} with other bytes "
        f"({time.monotonic() - started:.0f} s; undisturbed {seconds:.2f} s)"
    )
    return wrong


def convert(source: Path, out: Path, executor: Executor | None = None) -> None:
    """The conversion in small blocks, on two threads or by an executor."""
    planned = plan(parse_recipe(json.dumps(RECIPE), "killed"), source)
    means = Means(block_bytes=1 << 17, jobs=2, executor=executor)
    carry_out(planned, find_converter("streaming"), out, means)


def write_source(folder: Path) -> None:
    """About 50 MB in 48 modules."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{index}.weight": torch.randn(512, 1024, generator=generator).bfloat16()
        for index in range(48)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


if __name__ == "__main__":
    main()
