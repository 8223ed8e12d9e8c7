"""Mutate recipes, as texts and as structures; only `InvalidInput` may come of it, and soon.

python tests/nightly/fuzz_recipes.py --count 1000000 --seed 1
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from quantrecipe.schema.canonical import digest, recipe_digest
from quantrecipe.schema.document import document_of, parse_text
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.validation import examine_text, parse_recipe

CASES: Final = Path(__file__).parent.parent / "schema" / "cases"
MAX_SECONDS: Final = 2.0
"""The longest that one document may take; they have a few kilobytes."""

TOKENS: Final = (
    *b"{ } [ ] : , \" ' \\ - # // /* ** re:( ? | > &a *a !!python/object <<: --- ...".split(b" "),
    *b"null true NaN -Infinity 1e999 1e-6 9007199254740993 010 0 \\ud800 \\u0000".split(b" "),
    *(
        b"\n",
        b"\t",
        b" ",
        b"\r",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xf0\x9f\x8e\x89",
        b"\xc2\x85",
    ),
    *(b"{" * 200, b"[" * 200, b"- " * 200, b"\n%YAML 1.1\n", b'"kind"', b'"version"'),
)
WORDS: Final = (
    *("recipe", "layout", "lock", "statistics", "int8", "channel", "group", "**", "{0..9}", "{a,"),
    *("re:(a*)*b", "re:[", "", "on", "1:30", "~", "\u2028", "x\n", "\x7f", "a" * 2000, "/", "~1"),
)
SCALARS: Final[tuple[Any, ...]] = (
    *WORDS,
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    1.5,
    1e300,
    -0.0,
    2**53 - 1,
    [],
    {},
)


@dataclass
class Tally:
    """What came of it: how many of each outcome, and the slowest."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0


def seeds() -> list[Any]:
    """The documents to start from: those of the shared corpus."""
    files = [json.loads(path.read_text("utf-8")) for path in sorted(CASES.glob("*.json"))]
    return [case.get("recipe", case.get("document")) for file in files for case in file]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, double or insert pieces, without a look at what they are."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 1, 2, 8, 64)))
        action = rng.randrange(5)
        if action == 0:
            data = data[:start] + bytes([rng.randrange(256)]) + data[start + 1 :]
        elif action == 1:
            data = data[:start] + data[end:]
        elif action == 2:
            data = data[:end] + data[start:end] * rng.choice((1, 1, 50)) + data[end:]
        elif action == 3:
            data = data[:start]
        else:
            data = data[:start] + rng.choice(TOKENS) + data[start:]
    return data


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Delete, rename, replace or add entries anywhere."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 4)):
        places = [place for place in _holders(value) if place]
        if not places:
            return rng.choice(SCALARS)
        holder = rng.choice(places)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        action = rng.randrange(4)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[rng.choice(WORDS)] = holder.pop(key)
        elif action == 2 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(rng.choice(SCALARS)))
        elif action == 2:
            holder[rng.choice(WORDS)] = copy.deepcopy(rng.choice(SCALARS))
        else:
            holder[key] = copy.deepcopy(rng.choice((*SCALARS, rng.choice(places))))
    return value


def _holders(value: Any) -> list[Any]:
    if not isinstance(value, dict | list):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [value, *(holder for entry in inner for holder in _holders(entry))]


def as_json(value: Any, rng: random.Random) -> bytes:
    """The value as JSON, tight or spread out."""
    return json.dumps(value, indent=rng.choice((None, 2)), ensure_ascii=rng.random() < 0.5).encode()


def as_yaml(value: Any, rng: random.Random) -> bytes:
    """The value as YAML, in blocks or in braces."""
    return yaml.safe_dump(value, default_flow_style=rng.choice((None, True, False))).encode()


def feed(data: bytes, file: str, tally: Tally) -> None:
    """Read one document every way there is.

    Raises:
        AssertionError: something else than ``InvalidInput`` was raised, or it took too long.
    """
    start = time.process_time()
    try:
        parsed = parse_text(data, file)
        examined = examine_text(parsed)
        for problem in examined.problems:
            assert problem.kind != "invalid-value", problem
            assert problem.file == file, problem
            tally.kinds[problem.kind] += 1
        tally.outcomes["invalid" if examined.problems else "valid"] += 1
        if examined.kind == "recipe" and not examined.problems:
            assert recipe_digest(parse_recipe(data, file)) == digest(parsed.value)
        with suppress(InvalidInput):
            document_of(parsed)
    except Exception as error:
        raise AssertionError(f"{file}: {type(error).__name__}: {error}\n{data!r}") from error
    seconds = time.process_time() - start
    tally.slowest = max(tally.slowest, seconds)
    assert seconds < MAX_SECONDS, f"{file} took {seconds:.1f} s\n{data!r}"


def fuzz(count: int, seed: int, yaml_share: float = 0.05) -> Tally:
    """Feed ``count`` mutated documents, the same ones for the same seed."""
    rng = random.Random(seed)
    documents, tally = seeds(), Tally()
    for _ in range(count):
        value = rng.choice(documents)
        if rng.random() < 0.5:
            value = mutate_value(value, rng)
        is_yaml = rng.random() < yaml_share
        data = as_yaml(value, rng) if is_yaml else as_json(value, rng)
        if rng.random() < 0.6:
            data = mutate_bytes(data, rng)
        feed(data, "fuzzed.yaml" if is_yaml else "fuzzed.json", tally)
    return tally


def main() -> None:
    """Run it, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--yaml-share", type=float, default=0.05, help="how many are YAML, 0 to 1")
    arguments = parser.parse_args()
    start = time.process_time()
    tally = fuzz(arguments.count, arguments.seed, arguments.yaml_share)
    seconds = time.process_time() - start
    lines = [f"{arguments.count:,} documents in {seconds:.0f} s, slowest {tally.slowest:.3f} s"]
    lines += [f"{count:>12,}  {name}" for name, count in tally.outcomes.most_common()]
    lines += [f"{count:>12,}  {name}" for name, count in tally.kinds.most_common()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
