"""Seconds of torchao's INT8 linear with dynamic activations, as JSON on the last line.

Run by ``cpu_linear.py``: rows, out features, in features, threads, repetitions.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
import torchao
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_


@torch.inference_mode()
def main() -> None:
    """Measure one shape, without compiling."""
    rows, out_features, in_features, threads, repeat = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    model = torch.nn.Sequential(torch.nn.Linear(in_features, out_features, bias=False)).bfloat16()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    x = torch.randn(rows, in_features, dtype=torch.bfloat16)
    taken = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        model(x)
        taken.append(time.perf_counter() - started)
        if sum(taken) > 3.0:
            break
    seconds = statistics.median(taken[1:] or taken)
    print(json.dumps({f"W8A8 torchao {torchao.__version__}": seconds}))


if __name__ == "__main__":
    main()
