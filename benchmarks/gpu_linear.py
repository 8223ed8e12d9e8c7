"""INT8 linears on a GPU beside bfloat16, FP8 and other programs, for the shapes of Ideogram 4.

    python benchmarks/gpu_linear.py [--rows 4352 1024 16 2 1] [--peers] [--eager] [--json FILE]

Every figure is the device's time for one call inside a CUDA graph, the median of several replays,
with weights that rotate so that none is in the cache; ``--eager`` times launches too. Products
are computed on random data. ``--peers`` adds ``torch._int_mm``, torchao and SDNQ, which take long
to compile.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantrecipe.loaders import QuantizedLinear
from quantrecipe.loaders.kernels import hopper
from quantrecipe.loaders.kernels.on_triton import config_for, multiply
from quantrecipe.loaders.kernels.tuning import device_seconds, rotated, time_calls
from quantrecipe.schema.schemes import DynamicActivation, Int8Channel

SHAPES = {
    "qkv": (13824, 4608),
    "attn-out": (4608, 4608),
    "ffn-up": (12288, 4608),
    "ffn-down": (4608, 12288),
    "llm-proj": (4608, 53248),
}
CHANNEL = Int8Channel(format="int8", granularity="channel")
TOKEN = DynamicActivation(format="int8", granularity="token", dynamic=True)
FP8 = torch.float8_e4m3fn
Timer = Callable[[list[Callable[[], object]]], float]


def linear(out_features: int, in_features: int, smoothing: bool) -> QuantizedLinear:
    """Ours, with random codes."""
    module = QuantizedLinear(
        in_features,
        out_features,
        CHANNEL,
        TOKEN,
        smoothing=smoothing,
        bias=False,
        device="cuda",
    )
    with torch.no_grad():
        module.weight.random_(-127, 128)
        module.get_parameter("weight_scale").uniform_(0.5e-3, 1e-3)
        if module.smoothing is not None:
            module.smoothing.uniform_(0.5, 2.0)
    return module


def quantized_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """The usual dynamic quantization by row, which ``torch.compile`` makes one kernel of."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(FP8), scale


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """FP8 with scales by row, activations quantized in the call."""
    codes, x_scale = quantized_to_fp8(x)
    return torch._scaled_mm(codes, weight.T, x_scale, scale.T, out_dtype=torch.bfloat16)


def quantized_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same for int8."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / 127.0
    return (x.float() / scale).round().clamp(-127.0, 127.0).to(torch.int8), scale


def two_step(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``torch._int_mm``, then scales."""
    codes, x_scale = quantized_to_int8(x)
    return (torch._int_mm(codes, weight.T).float() * x_scale * scale.T).to(torch.bfloat16)


def torchao_linear(out_features: int, in_features: int) -> Callable[[Tensor], Tensor]:
    """Dynamic INT8 of torchao, compiled as it asks to be."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    made = nn.Linear(in_features, out_features, bias=False, device="cuda", dtype=torch.bfloat16)
    quantize_(made, Int8DynamicActivationInt8WeightConfig())
    compiled: Callable[[Tensor], Tensor] = torch.compile(made, fullgraph=True)
    return compiled


def sdnq_linear() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """SDNQ's INT8 matrix product, with its own Triton kernel."""
    from sdnq.layers.linear.linear_int8 import int8_matmul

    return lambda x, weight, scale: int8_matmul(x, weight.T, scale.T)


def measure(
    rows: int, out_features: int, in_features: int, time: Timer, peers: bool = False
) -> Iterator[Any]:
    """Names and seconds."""
    x = torch.randn(rows, in_features, device="cuda", dtype=torch.bfloat16)
    plain = rotated(
        lambda: torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
    )
    yield "bf16", time([partial(nn.functional.linear, x, w) for w in plain])
    del plain
    ours = [linear(out_features, in_features, True)]
    while sum(each.weight.nbytes for each in ours) < 256 << 20 or len(ours) < 2:
        ours.append(linear(out_features, in_features, True))
    yield "ours", time([partial(m, x) for m in ours])

    config = config_for(rows, ours[0].weight, x.dtype)
    codes, scale = quantized_to_int8(x)
    yield (
        "ours: product",
        time(
            [
                partial(
                    multiply,
                    codes,
                    scale.view(-1),
                    m.weight.data,
                    m.get_parameter("weight_scale").data,
                    None,
                    torch.bfloat16,
                    config,
                )
                for m in ours
            ]
        ),
    )
    smoothing = ours[0].smoothing
    assert smoothing is not None
    if hopper.can_quantize(x):
        yield "ours: codes", time([lambda: hopper.quantize(x, smoothing)] * 8)
    weights = [m.weight.data for m in ours]
    scales = ours[0].get_parameter("weight_scale").data
    eights = [w.view(FP8) for w in weights]
    for each in eights:  # no NaN: its patterns are the largest magnitudes
        each.view(torch.int8).bitwise_and_(-2)
    x8, x_scale = quantized_to_fp8(x)
    yield from attempt(
        "fp8: product",
        lambda: time(
            [
                partial(torch._scaled_mm, x8, w.T, x_scale, scales.T, out_dtype=torch.bfloat16)
                for w in eights
            ]
        ),
    )
    whole = torch.compile(fp8_linear, dynamic=False)
    yield from attempt("fp8", lambda: time([partial(whole, x, w, scales) for w in eights]))
    if not peers:
        return
    if rows > 16:
        yield "_int_mm: product", time([partial(torch._int_mm, codes, w.T) for w in weights])
        yield from attempt(
            "_int_mm, eager", lambda: time([partial(two_step, x, w, scales) for w in weights])
        )
        step = torch.compile(two_step, dynamic=False)
        yield from attempt(
            "_int_mm, compiled", lambda: time([partial(step, x, w, scales) for w in weights])
        )
    if rows > 16:
        yield from attempt("sdnq", lambda: sdnq_seconds(x, weights, scales, time))
    yield from attempt(
        "torchao", lambda: torchao_seconds(x, out_features, in_features, len(weights), time)
    )


def sdnq_seconds(x: Tensor, weights: list[Tensor], scales: Tensor, time: Timer) -> float:
    """Seconds of SDNQ."""
    theirs = sdnq_linear()
    return time([partial(theirs, x, w, scales) for w in weights])


def torchao_seconds(
    x: Tensor, out_features: int, in_features: int, count: int, time: Timer
) -> float:
    """Seconds of torchao."""
    theirs = [torchao_linear(out_features, in_features) for _ in range(min(count, 3))]
    with torch.no_grad():
        return time([partial(m, x) for m in theirs])


def attempt(name: str, run: Callable[[], float]) -> Iterator[tuple[str, float]]:
    """A peer's figure, or a line on stderr saying why there is none."""
    try:
        yield name, run()
    except Exception as error:  # noqa: BLE001 - whatever a peer fails with
        print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)


def eager(calls: list[Callable[[], object]]) -> float:
    """Seconds of one call as Python launches it, one after the other."""
    for call in calls[:3]:
        call()
    some = calls[:4] * 20

    def run() -> None:
        for call in some:
            call()

    torch.cuda.synchronize()
    return device_seconds(run, 5) / len(some)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[4352, 1024, 16, 2, 1])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    timer: Timer = eager if options.eager else time_calls
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    results = []
    for rows in options.rows:
        ratios = []
        for name in options.shapes:
            out_features, in_features = SHAPES[name]
            with torch.no_grad():
                found = dict(measure(rows, out_features, in_features, timer, options.peers))
            results.append({"rows": rows, "shape": name, "seconds": found})
            operations = 2 * rows * out_features * in_features
            ratios.append(found["bf16"] / found["ours"])
            print(f"{name} M={rows}: {ratios[-1]:.2f}x bf16", end="")
            if "fp8" in found and "fp8: product" in found:
                products = found["fp8: product"] / found["ours: product"]
                print(f", {found['fp8'] / found['ours']:.2f}x fp8; product {products:.2f}x", end="")
            print()
            for each, seconds in found.items():
                rate = operations / seconds / 1e12
                print(f"    {each:<18} {seconds * 1e6:9.1f} us {rate:7.0f} T/s", flush=True)
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"M={rows}: geometric mean {mean:.2f}x bf16", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
