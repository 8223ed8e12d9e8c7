"""Finding the fastest way to cut up a product, by trying."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import product as combinations
from typing import Final

import torch
from torch import Tensor

from quantrecipe.loaders.kernels import hopper
from quantrecipe.loaders.kernels.call import LinearCall
from quantrecipe.loaders.kernels.configs import FEW_ROWS, Measured, Product, TritonProduct
from quantrecipe.loaders.kernels.gpus import gpu
from quantrecipe.loaders.kernels.on_triton import TritonKernel, multiply

_GROUPS: Final = (4, 8, 16)
_ROTATED_BYTES: Final = 256 << 20
"""Operands are changed from call to call, so that none is found in the cache."""
_BEST: Final = 3  # of the first round go to the second


def device_seconds(run: Callable[[], object], repeats: int) -> float:
    """Seconds between the device's beginning and ending of ``run``, the median of several."""
    measured = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        measured.append(start.elapsed_time(end) / 1e3)
    return float(statistics.median(measured))


def time_calls(calls: Sequence[Callable[[], object]], replays: int = 5) -> float:
    """Seconds of one call, the median over replays of a CUDA graph of all of them.

    Launches cost nothing in a graph: this is the device's time.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return device_seconds(graph.replay, replays) / len(calls)


def rotated(make: Callable[[], Tensor]) -> list[Tensor]:
    """As many tensors as it takes to push each other out of the cache."""
    first = make()
    count = max(2, -(-_ROTATED_BYTES // first.nbytes))
    return [first, *(make() for _ in range(count - 1))]


def cannot_tune(device: torch.device) -> str | None:
    """Why nothing can be measured on a device, or ``None``."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()}, counted from 0"
    return TritonKernel().refuses(
        LinearCall(
            rows=1,
            out_features=1,
            in_features=1,
            dtype=torch.bfloat16,
            device=device,
            code_dtype=torch.int8,
            scale_dtype=torch.float32,
            group=(1, 1),
            activation="int8:token",
            smoothing=False,
            rotation=0,
            bias=False,
        )
    )


def tune(
    shapes: Iterable[tuple[int, int]], rows: Iterable[int], device: torch.device | str
) -> Iterator[Measured]:
    """The fastest product of int8 codes for each shape and number of rows, in bfloat16.

    Args:
        shapes: ``(out_features, in_features)`` of weights.
        rows: of activations.
        device: an NVIDIA GPU for which ``cannot_tune`` has nothing to say.
    """
    device = torch.device(device)
    found = gpu(device)
    with torch.cuda.device(device):
        for (out_features, in_features), each in combinations(list(shapes), list(rows)):
            candidates = [
                candidate
                for candidate in _candidates(device, each, in_features)
                if candidate.runs(found.architecture)
            ]
            problem = _Problem(each, out_features, in_features)
            fastest = _fastest(problem, candidates, replays=2)[:_BEST]
            regrouped = [
                replace(config, group=group)
                for config in fastest
                for group in _GROUPS
                if each > FEW_ROWS or group == _GROUPS[0]
            ]
            best = _fastest(problem, regrouped, replays=5)[0]
            yield Measured(
                architecture=found.architecture,
                device=found.name,
                out_features=out_features,
                in_features=in_features,
                rows=each,
                product=best,
                microseconds=round(problem.seconds(best, 9) * 1e6, 1),
            )


class _Problem:
    def __init__(self, rows: int, out_features: int, in_features: int) -> None:
        def codes(*shape: int) -> Tensor:
            return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")

        self._codes = codes(rows, in_features)
        self._scale = torch.rand(rows, device="cuda") + 0.5
        self._weights = rotated(lambda: codes(out_features, in_features))
        self._weight_scale = torch.rand(out_features, 1, device="cuda") + 0.5

    def seconds(self, config: Product, replays: int) -> float:
        """What one product takes."""

        def call(weight: Tensor) -> Callable[[], object]:
            return lambda: multiply(
                self._codes,
                self._scale,
                weight,
                self._weight_scale,
                None,
                torch.bfloat16,
                config,
            )

        return time_calls([call(weight) for weight in self._weights], replays)


def _candidates(device: torch.device, rows: int, in_features: int) -> tuple[Product, ...]:
    if rows > FEW_ROWS and hopper.can_multiply(device, torch.bfloat16, in_features):
        return hopper.CANDIDATES
    if rows <= FEW_ROWS:
        tall = 16 if rows <= 16 else 64
        return tuple(
            TritonProduct(tall, columns, depth, warps, stages, _GROUPS[0])
            for columns, depth, warps, stages in (
                (64, 256, 4, 4),
                (32, 256, 4, 4),
                (32, 256, 2, 6),
                (32, 512, 4, 3),
                (16, 512, 2, 4),
                (16, 512, 4, 4),
                (16, 1024, 4, 3),
                (128, 128, 4, 5),
            )
        )
    return tuple(
        TritonProduct(*tile, depth, warps, stages, 8)
        for tile in ((128, 128), (128, 256), (256, 128), (64, 128), (128, 64), (64, 64))
        for depth, warps, stages in ((64, 4, 4), (64, 8, 4), (128, 4, 3), (128, 8, 3), (128, 8, 4))
    )


def _fastest(problem: _Problem, candidates: Sequence[Product], replays: int) -> list[Product]:
    """Those that run at all, the fastest first."""
    # Compiled side by side first: each takes a second, and none needs the GPU for it.
    with ThreadPoolExecutor() as pool:
        mine = [each for each in candidates if isinstance(each, hopper.HopperProduct)]
        list(pool.map(hopper.compile_product, mine))
    timed = [(seconds, each) for each in candidates if (seconds := _try(problem, each, replays))]
    if not timed:
        raise RuntimeError("no configuration runs on this GPU")
    return [each for _, each in sorted(timed, key=lambda pair: pair[0])]


def _try(problem: _Problem, config: Product, replays: int) -> float | None:
    # Too many registers, say: which error that is depends on who finds it.
    with suppress(Exception):
        return problem.seconds(config, replays)
    return None
