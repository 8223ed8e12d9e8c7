"""One row block from source to target format, plain and compiled: GB/s of source bytes.

    python benchmarks/block_kernels.py

Blocks have the size and the reused buffers that a conversion uses, so that they come from the
cache, as they do after a read. Errors are measured along. Beside it: copying such blocks out of a
large memory into a reused buffer, with as many threads. Prints a Markdown table; the best of
several runs, since whatever else the machine does only ever adds time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import torch
from _measure import machine
from pydantic import TypeAdapter
from torch import Tensor

from quantrecipe.converter.protocol import DEFAULT_BLOCK_BYTES
from quantrecipe.formats import get_format, quantize
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.transform import BlockTransform, CompiledTransform, block_transform
from quantrecipe.schema.schemes import AnyScaledWeight, AnyWeight, PlainWeight, Weight

SHAPES: Final = ((4608, 12288), (12288, 4608), (4608, 53248))
"""Rows and columns of Ideogram 4's linear layers."""
PAIRS: Final = (
    ("bfloat16", "int8"),
    ("float8_e4m3fn", "int8"),
    ("bfloat16", "float8_e4m3fn"),
    ("float16", "int8"),
    ("float32", "int8"),
)
_WEIGHT: Final[TypeAdapter[Any]] = TypeAdapter(Weight)
_COLD_BYTES: Final = 512 << 20


@dataclass(frozen=True, slots=True)
class Speed:
    """GB/s of source bytes: of wall time, and of the CPU time of all threads together."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} ({self.cpu:.2f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="runs, of which the best counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, torch {torch.__version__}\n")
    started = time.perf_counter()
    ready = isinstance(block_transform(_spec("bfloat16"), _spec("int8")), CompiledTransform)
    print(
        f"compiled path {'' if ready else 'not '}ready after {time.perf_counter() - started:.1f} s"
    )
    print("GB/s of source bytes by the clock (by CPU time), per channel, float32 scales\n")
    print(
        "| source -> target | shape | plain, 1 thread | compiled, 1 | compiled, 2 | copy, 1 / 2 |"
    )
    print("|---|---|---|---|---|---|")
    for pair in PAIRS:
        for shape in SHAPES:
            print(_row(*pair, shape, options.repeat), flush=True)


def _row(source: str, target: str, shape: tuple[int, int], repeat: int) -> str:
    plain, compiled = (
        block_transform(_spec(source), _spec(target), prefer_compiled=prefer)
        for prefer in (False, True)
    )
    speeds = [
        _speed(lambda: _transforming(plain, source, target, shape), 1, max(1, repeat // 2)),
        _speed(lambda: _transforming(compiled, source, target, shape), 1, repeat),
        _speed(lambda: _transforming(compiled, source, target, shape), 2, repeat),
    ]
    copies = [_speed(lambda: _copying(source, shape), threads, repeat) for threads in (1, 2)]
    cells = [f"{source} -> {target}", f"{shape[0]} x {shape[1]}", *map(str, speeds)]
    return f"| {' | '.join(cells)} | {copies[0].wall:.1f} / {copies[1].wall:.1f} |"


Work = tuple[int, Callable[[], None]]
"""Source bytes, and what goes over them once."""


def _speed(make: Callable[[], Work], threads: int, repeat: int) -> Speed:
    work = [make() for _ in range(threads)]
    best = Speed(0.0, 0.0)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeat + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            for done in [pool.submit(run) for _, run in work]:
                done.result()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            size = sum(size for size, _ in work) / 1e9
            best = Speed(max(best.wall, size / wall), max(best.cpu, size / cpu))
    return best


def _transforming(
    transform: BlockTransform, source: str, target: str, shape: tuple[int, int]
) -> Work:
    rows = _block_rows(shape)
    codes, scales = _stored(source, rows, shape[1])
    spec = _spec(target)
    assert not isinstance(spec, PlainWeight)
    codes_out = torch.empty(rows, shape[1], dtype=get_format(spec).code_dtype)
    scales_out = torch.empty(rows, 1)
    blocks = shape[0] // rows

    def run() -> None:
        for _ in range(blocks):
            transform(SourceBlock(codes, scales), TargetBlock(codes_out, scales_out))

    return blocks * codes.nbytes, run


def _copying(source: str, shape: tuple[int, int]) -> Work:
    block, _ = _stored(source, _block_rows(shape), shape[1])
    buffer = block.view(torch.uint8).flatten()
    count = max(1, _COLD_BYTES // block.nbytes)
    memory = torch.ones(count, block.nbytes, dtype=torch.uint8)

    def run() -> None:
        for row in memory:
            buffer.copy_(row)

    return memory.nbytes, run


def _block_rows(shape: tuple[int, int]) -> int:
    return max(1, DEFAULT_BLOCK_BYTES // (4 * shape[1]))


def _stored(source: str, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    stored = quantize(weight, _spec(source))
    return stored.codes, stored.scale


def _spec(name: str) -> Any:
    plain = name in ("bfloat16", "float16", "float32")
    spec: AnyWeight | AnyScaledWeight = _WEIGHT.validate_python(
        {"format": name} if plain else {"format": name, "granularity": "channel"}
    )
    return spec


if __name__ == "__main__":
    main()
