"""INT8 linears on the CPU against plain ones: milliseconds for each route, kernel and shape.

    python benchmarks/cpu_linear.py --torchao /an/environment/with/torchao/bin/python

Routes take turns, so that what else the machine does falls on all of them; medians count. torchao's
dynamic INT8 runs in a process of its own, before the turns of each shape. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch
from _measure import machine
from torch import Tensor
from torch.nn import functional

import quantrecipe.loaders.kernels  # noqa: F401  (registers the operator)

SHAPES: Final = ((4608, 4608), (12288, 4608), (1536, 384), (384, 1536))
"""Rows and columns of weights of Ideogram 4 and of MiniLM."""
ROWS: Final = (512, 16, 1)
PEER: Final = Path(__file__).with_name("peer_drivers") / "torchao_linear.py"
BASE: Final = "float32 linear"
_SECONDS: Final = 3.0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=9, help="turns, of which the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torchao", help="the Python of an environment that has torchao")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{machine()}, {capability}, {options.threads} threads, torch {torch.__version__}\n")
    print(f"Milliseconds; in brackets, the speed of `{BASE}` taken as 1.\n")
    titles: list[str] = []
    for shape in SHAPES:
        for rows in ROWS:
            times: dict[str, float] = {}
            if options.torchao:
                times |= _peer(options.torchao, rows, *shape, options.threads, options.repeat)
            times |= _medians(_routes(rows, *shape), options.repeat)
            if not titles:
                titles = [BASE, *(name for name in times if name != BASE)]
                print("| rows | weight | " + " | ".join(titles) + " |")
                print("|---:|---|" + "---:|" * len(titles))
            cells = [
                f"{1e3 * times[name]:.2f} ({times[BASE] / times[name]:.2f})" for name in titles
            ]
            print(f"| {rows} | {shape[0]} x {shape[1]} | " + " | ".join(cells) + " |", flush=True)


def _routes(rows: int, out_features: int, in_features: int) -> dict[str, Callable[[], Tensor]]:
    codes = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
    scale = torch.rand(out_features, 1) / 1000 + 1e-4
    plain = codes * scale
    short = plain.bfloat16()
    x = torch.randn(rows, in_features)
    x_codes, x_short = torch.randint(-127, 128, x.shape, dtype=torch.int8), x.bfloat16()

    def linear(values: Tensor, activation: str, kernel: str) -> Tensor:
        result: Tensor = torch.ops.quantrecipe.linear(
            values, codes, scale, None, None, 0, [1, in_features], activation, kernel
        )
        return result

    return {
        BASE: lambda: functional.linear(x, plain),
        "bfloat16 linear": lambda: functional.linear(x_short, short),
        "`torch._int_mm` alone": lambda: torch._int_mm(x_codes, codes.T),
        "W8A8 `int_mm`": lambda: linear(x_short, "int8:token", "int_mm"),
        "W8A8 `dequantized`": lambda: linear(x_short, "int8:token", "dequantized"),
        "weight-only `dequantized`": lambda: linear(x_short, "", "dequantized"),
    }


def _medians(routes: Mapping[str, Callable[[], Tensor]], repeat: int) -> dict[str, float]:
    """Medians of seconds; a route that has taken long enough is left out of further turns."""
    taken: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(repeat + 1):
        for name, route in routes.items():
            if sum(taken[name]) < _SECONDS:
                started = time.perf_counter()
                route()
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:] or times) for name, times in taken.items()}


def _peer(
    python: str, rows: int, out_features: int, in_features: int, threads: int, repeat: int
) -> dict[str, float]:
    numbers = map(str, (rows, out_features, in_features, threads, repeat))
    command = [python, str(PEER), *numbers]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured: dict[str, float] = json.loads(said.splitlines()[-1])
    return measured


if __name__ == "__main__":
    main()
