"""What observing a model costs: a forward through the linears of a layer of Ideogram 4.

    python benchmarks/observing.py --device cuda

Routes take turns; the least CPU time counts, since what else the machine does only adds to it, or
on a GPU that of its clock. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from _measure import machine
from torch import Tensor, nn
from torch.nn import functional

from quantrecipe.converter.calibration import Measurements, observe

WIDTH, HIDDEN = 4608, 12288


class Block(nn.Module):
    """The linears of a layer, in their order; attention itself is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.w1, self.w3 = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """One pass, ``[rows, WIDTH]`` to the same."""
        x = self.o(self.qkv(x)[:, :WIDTH])
        out: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return out


ROUTES: Final[dict[str, Callable[[Block], AbstractContextManager[Measurements | None]]]] = {
    "not observed": lambda block: nullcontext(),
    "observed": lambda block: observe(block),
    "64 tokens kept": lambda block: observe(block, reservoir=64),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=0, help="tokens; 256, on a GPU 4352")
    parser.add_argument("--repeat", type=int, default=5, help="turns")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_cpu = device.type == "cpu"
    torch.set_num_threads(1)
    dtype = torch.float32 if on_cpu else torch.bfloat16
    with device:
        block, x = Block().to(dtype), torch.randn(options.rows or (256 if on_cpu else 4352), WIDTH)
    x = x.to(dtype)
    times: dict[str, list[float]] = {name: [] for name in ROUTES}
    for _ in range(options.repeat):
        for name, observing in ROUTES.items():
            with observing(block), torch.inference_mode():
                if not on_cpu:
                    block(x)
                times[name].append(_milliseconds(block, x, on_cpu))
    name = machine() if on_cpu else torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, {len(x)} tokens in {dtype}\n")
    print("| forward of a layer's linears | ms | |\n|---|---:|---:|")
    base = min(times["not observed"])
    for route, found in times.items():
        print(f"| {route} | {min(found):.1f} | {100 * (min(found) / base - 1):+.1f} % |")


def _milliseconds(block: Block, x: Tensor, on_cpu: bool) -> float:
    if on_cpu:
        start = time.thread_time()
        block(x)
        return 1e3 * (time.thread_time() - start)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    first, last = events
    first.record()
    block(x)
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


if __name__ == "__main__":
    main()
