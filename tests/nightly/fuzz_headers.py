"""Throw mutated safetensors files at the header reader, and hold it against the library's own.

    python tests/nightly/fuzz_headers.py --count 1000000 --seed 1

Every file must either be refused with ``InvalidInput`` or be read, and then the safetensors library
must read the same tensors from it. Files that only this reader refuses are counted by kind: it is
meant to be stricter, in known ways. Prints a summary; exit code 1 at the first finding, whose bytes
it prints.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors

from quantrecipe.checkpoint import read_header
from quantrecipe.schema.dtypes import BY_CODE, DTYPES
from quantrecipe.schema.placement import encode_header
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.tensors import OutputTensor, SourceFileInfo

SLOWEST_SECONDS = 2.0
STRICTER = frozenset(
    {"bad-tensor-entry", "bad-shape", "duplicate-key", "header-not-json", "not-safetensors"}
)
"""The kinds of problems for which the library may accept what this reader refuses."""

TOKENS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"\n", b"\0", b"\xff", b"-", b"0"),
    *(b"1e999", b"NaN", b"-0", b"null", b"true", b"1.0", b"\\u0000", b"\\ud800", b"\xed\xa0\x80"),
    *(b"18446744073709551615", b"9223372036854775808", b"__metadata__", b'"dtype":"U8",'),
]
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 8, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, 1.0, 1e308),
    *(
        "",
        "U8",
        "F4",
        "F32",
        "u8",
        "x",
        [],
        [0],
        [0, 0],
        [1],
        [2, 3],
        [-1],
        [[]],
        [None],
        {},
        {"a": 1},
    ),
]


class FindingError(AssertionError):
    """A file on which the reader does not hold what it promises."""


def valid_file(rng: random.Random) -> tuple[bytes, bytes]:
    """Header text and payload of a small file."""
    names = rng.sample(["a", "b.weight", "ü", "layer.0", "", "\n", '"', "{x}", "__meta"], 4)
    tensors = []
    for name in names[: rng.randint(0, 4)]:
        dtype = rng.choice(list(DTYPES))
        shape = [rng.choice((0, 1, 2, 3, 8)) for _ in range(rng.randint(0, 3))]
        shape += [4] * (DTYPES[dtype].bits % 8 != 0)
        tensors.append(OutputTensor(name, dtype, tuple(shape)))
    metadata = {"k": rng.choice(["", "v", '{"a":[1]}'])} if rng.random() < 0.4 else {}
    return encode_header(tensors, metadata)[8:], bytes(sum(one.nbytes for one in tensors))


def mutate_bytes(rng: random.Random, text: bytes) -> bytes:
    """Change, insert, delete, repeat or cut bytes."""
    data = bytearray(text)
    for _ in range(rng.randint(1, 3)):
        at, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        end = min(end, at + 12)
        change = rng.randrange(5)
        if change == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif change == 1:
            data[at:at] = rng.choice(TOKENS)
        elif change == 2:
            del data[at:end]
        elif change == 3:
            data[end:end] = data[at:end] * rng.choice((1, 1, 2, 50))
        else:
            data[at:end] = rng.choice(TOKENS)
    return bytes(data)


def mutate_structure(rng: random.Random, text: bytes) -> bytes:
    """Change values, fields or order, keeping it JSON."""
    header: dict[str, Any] = json.loads(text)
    for _ in range(rng.randint(1, 2)):
        key = rng.choice(list(header) or ["__metadata__"])
        entry = header.get(key)
        change = rng.randrange(6)
        if change == 0 or not isinstance(entry, dict) or not entry:
            header[key] = rng.choice(VALUES)
        elif change == 1:
            entry[rng.choice([*entry, "more"])] = rng.choice(VALUES)
        elif change == 2:
            del entry[rng.choice(list(entry))]
        elif change == 3:
            header[rng.choice(["z", "__metadata__"])] = dict(entry)
        elif isinstance(numbers := entry.get(rng.choice(["shape", "data_offsets"])), list):
            at = rng.randrange(len(numbers) + 1)
            numbers[at : at + rng.randint(0, 1)] = [rng.choice((0, 1, 2, 3, 4, 8, 2**40, -1))]
    pairs = list(header.items())
    rng.shuffle(pairs)
    if pairs and rng.random() < 0.1:
        pairs.append(rng.choice(pairs))
    spaces: Callable[[], str] = lambda: rng.choice(("", "", "", " ", "\n"))  # noqa: E731
    body = ",".join(
        f"{spaces()}{json.dumps(key, ensure_ascii=rng.random() < 0.5)}{spaces()}:{spaces()}"
        + json.dumps(value, separators=rng.choice(((",", ":"), (", ", ": "))))
        for key, value in pairs
    )
    return f"{{{body}{spaces()}}}{spaces()}".encode()


def make(rng: random.Random) -> bytes:
    """One file, mutated or (sometimes) not."""
    text, payload = valid_file(rng)
    kind = rng.randrange(10)
    if kind < 4:
        text = mutate_bytes(rng, text)
    elif kind < 8:
        text = mutate_structure(rng, text)
    length = len(text)
    if rng.random() < 0.05:
        length = rng.choice((0, 1, length - 1, length + 1, length + len(payload), 10**8 + 1, 2**63))
    if rng.random() < 0.1:
        payload = bytes(max(0, len(payload) + rng.choice((-2, -1, 1, 2, 8))))
    data = max(0, length).to_bytes(8, "little") + text + payload
    return data[: rng.randint(0, len(data))] if rng.random() < 0.03 else data


def library_reads(data: bytes) -> dict[str, tuple[str, tuple[int, ...], int]] | None:
    """What the safetensors library sees in a file; ``None`` if it refuses it."""
    try:
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {
        name: (BY_CODE[one["dtype"]].name, tuple(one["shape"]), len(one["data"]))
        for name, one in tensors
    }


def check(data: bytes, path: Path) -> str:
    """Read one file both ways.

    Returns:
        ``read``, ``refused by both``, or the kind for which only this reader refuses.

    Raises:
        FindingError: the readers disagree in a way they must not, or this one failed or dawdled.
    """
    path.write_bytes(data)
    start = time.process_time()
    ours: SourceFileInfo | None = None
    kinds: tuple[str, ...] = ()
    try:
        ours = read_header(path)
    except InvalidInput as error:
        kinds = tuple(problem.kind for problem in error.problems)
    except Exception as error:
        raise FindingError(f"{error!r} on {data!r}") from error
    if (seconds := time.process_time() - start) > SLOWEST_SECONDS:
        raise FindingError(f"took {seconds:.1f} s on {data!r}")
    theirs = library_reads(data)
    if ours is not None:
        read = {name: (one.dtype, one.shape, one.nbytes) for name, one in ours.tensors.items()}
        if read != theirs:
            raise FindingError(f"read {read}, the library {theirs}, of {data!r}")
        return "read"
    if theirs is None:
        return "refused by both"
    if not STRICTER.issuperset(kinds):
        raise FindingError(f"refused as {kinds}, and the library reads {data!r}")
    return f"stricter: {kinds[0]}"


def run(count: int, seed: int) -> Counter[str]:
    """Check ``count`` files made from ``seed``, and count the verdicts."""
    rng = random.Random(seed)
    verdicts: Counter[str] = Counter()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path = Path(folder) / "x.safetensors"
        for _ in range(count):
            verdicts[check(make(rng), path)] += 1
    return verdicts


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    try:
        verdicts = run(arguments.count, arguments.seed)
    except FindingError as finding:
        sys.stderr.write(f"seed {arguments.seed}: {finding}\n")
        return 1
    for verdict, times in verdicts.most_common():
        sys.stdout.write(f"{times:10,}  {verdict}\n")
    sys.stdout.write(f"{time.perf_counter() - start:10.0f}  seconds\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
