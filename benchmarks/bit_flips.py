"""Single-bit flips in everything that a conversion writes: weights, lock, index, small files.

    python benchmarks/bit_flips.py --count 1000

Converts a small checkpoint, flips one bit at a time anywhere in what was written, and says how many
of the flips ``verify`` finds: by itself, and against the source. Then the same with what an
interrupted conversion leaves, journal and plan included: going on must end in the right bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantrecipe.converter import convert
from quantrecipe.evaluate import verify
from quantrecipe.schema.json_text import parse_json
from quantrecipe.schema.lock import LOCK_NAME
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.validation import parse_recipe

RECIPE: dict[str, Any] = {
    "kind": "recipe",
    "version": 1,
    "name": "flipped",
    "source": {"layout": "plain", "parts": {"one": "one.safetensors", "two": "two.safetensors"}},
    "schemes": {
        "w8a8": {
            "weight": {"format": "int8", "granularity": "channel"},
            "activation": {"format": "int8", "granularity": "token", "dynamic": True},
        }
    },
    "rules": [{"modules": ["blocks.*.up"], "scheme": "w8a8"}],
    "protected": [{"modules": ["blocks.0.down"], "dtype": "bfloat16", "reason": "spikes"}],
    "target": {
        "layout": "int8-scaled",
        "parts": {"one": "one.safetensors", "two": "two.safetensors"},
        "max_shard_size": "1KB",
    },
}


@dataclass(frozen=True)
class Checkpoint:
    """A source and what it was converted to."""

    source: Path
    out: Path

    @property
    def files(self) -> list[Path]:
        """Every file that was written."""
        return sorted(path for path in self.out.rglob("*") if path.is_file())


def build(work: Path) -> Checkpoint:
    """A checkpoint of two parts, one of them in shards, with modules of every disposition."""
    torch.manual_seed(0)
    source, out = work / "source", work / "out"
    source.mkdir(parents=True)
    for part, blocks in (("one", 3), ("two", 1)):
        tensors = {"norm.weight": torch.randn(8).bfloat16()}
        for block in range(blocks):
            tensors[f"blocks.{block}.up.weight"] = torch.randn(24, 16).bfloat16()
            tensors[f"blocks.{block}.up.bias"] = torch.randn(24).bfloat16()
            tensors[f"blocks.{block}.down.weight"] = torch.randn(16, 8)
        save_file(tensors, source / f"{part}.safetensors", {"format": "pt", "about": part})
    config = {"layers": 3, "hidden_size": 16, "names": ["one", "two"], "torch_dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config, indent=2))
    vocabulary = {f"token-{number}": number for number in range(40)}
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    convert(parsed(), source, out)
    return Checkpoint(source, out)


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """A file with one bit flipped, for as long as it lasts."""
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[bit // 8] ^= 1 << bit % 8
    path.write_bytes(broken)
    try:
        yield
    finally:
        path.write_bytes(whole)


def field_of(text: bytes, byte: int) -> str | None:
    """The JSON pointer of the string or number that a byte of a document is in."""
    decoder, decoded = json.JSONDecoder(), text.decode()
    assert len(decoded) == len(text), "characters and bytes are counted alike in ASCII only"
    for pointer, start in parse_json(text).values.items():
        if decoded[start] in "{[" or start > byte:
            continue
        if byte < decoder.raw_decode(decoded, start)[1]:
            return pointer
    return None


class _Enough(Exception):  # noqa: N818 - an end that was planned
    pass


def interrupt(made: Checkpoint) -> Path:
    """Convert again, but not to the end; returns the folder that is left."""
    told = []

    def stop(count: int, name: str) -> None:
        told.append(name)
        if len(told) == 8:
            raise _Enough

    out = made.out.with_name("again")
    with suppress(_Enough):
        convert(parsed(), made.source, out, jobs=1, progress=stop)
    return out.with_name("again.partial")


def go_on(made: Checkpoint) -> bool:
    """Go on from what lies there, to the end; whether that gives the right bytes."""
    out = made.out.with_name("again")
    convert(parsed(), made.source, out, jobs=1)
    same = all(
        path.read_bytes() == (out / path.relative_to(made.out)).read_bytes() for path in made.files
    )
    shutil.rmtree(out)
    return same


def parsed() -> Recipe:
    """The recipe."""
    return parse_recipe(json.dumps(RECIPE), "recipe")


def main() -> None:
    """Flip, verify, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as work:
        made = build(Path(work))
        flip_output(made, arguments.count, chosen)
        flip_journals(made, arguments.count, chosen)


def flip_output(made: Checkpoint, count: int, chosen: random.Random) -> None:
    """Flips in what was published, for ``verify`` to find."""
    found: Counter[str] = Counter()
    missed: list[str] = []
    started = time.monotonic()
    assert verify(made.out, against=made.source).whole
    for _ in range(count):
        path, bit = choose(made.files, chosen)
        with flipped(path, bit):
            if not verify(made.out).whole:
                found[f"{path.name}: by itself"] += 1
                continue
            if not verify(made.out, against=made.source).whole:
                found[f"{path.name}: against its source"] += 1
                continue
        where = field_of(path.read_bytes(), bit // 8) if path.name == LOCK_NAME else None
        missed.append(f"{path.name} {where or f'byte {bit // 8}'} bit {bit % 8}")
    for what, number in sorted(found.items()):
        print(f"{number:6,}  {what}")
    print(f"{found.total():,} of {count:,} found ({time.monotonic() - started:.0f} s)")
    for what in missed:
        print(f"missed: {what}")


def flip_journals(made: Checkpoint, count: int, chosen: random.Random) -> None:
    """Flips in what an interrupted conversion left, to go on from."""
    done: Counter[str] = Counter()
    wrong: list[str] = []
    started = time.monotonic()
    partial = interrupt(made)
    kept = partial.with_name("kept")
    partial.rename(kept)
    for _ in range(count):
        shutil.copytree(kept, partial)
        path, bit = choose(sorted(path for path in partial.rglob("*") if path.is_file()), chosen)
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        done[path.name] += 1
        if not go_on(made):
            wrong.append(f"{path.name} byte {bit // 8} bit {bit % 8}")
    for what, number in sorted(done.items()):
        print(f"{number:6,}  {what}: gone on from")
    print(
        f"{count - len(wrong):,} of {count:,} ended in the right bytes "
        f"({time.monotonic() - started:.0f} s)"
    )
    for what in wrong:
        print(f"wrong: {what}")


def choose(files: list[Path], chosen: random.Random) -> tuple[Path, int]:
    """A file, the larger the likelier, and a bit in it."""
    files = [path for path in files if path.stat().st_size]
    (path,) = chosen.choices(files, [path.stat().st_size for path in files])
    return path, chosen.randrange(path.stat().st_size * 8)


if __name__ == "__main__":
    main()
