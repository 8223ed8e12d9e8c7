"""Blocks of the real Ideogram 4 transformer at full width, compiled: INT8 beside bfloat16.

    python benchmarks/gpu_blocks.py [--blocks 2] [--tokens 4352] [--json FILE]

Takes ``Ideogram4TransformerBlock`` from diffusers with random weights. Both versions are compiled
with ``fullgraph=True``, so that a graph break is an error, then replayed from a CUDA graph; the
shares of time come from torch's profiler.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantrecipe.formats import quantize
from quantrecipe.loaders import QuantizedLinear
from quantrecipe.loaders.kernels.tuning import device_seconds
from quantrecipe.schema.schemes import DynamicActivation, Int8Channel

CHANNEL = Int8Channel(format="int8", granularity="channel")
TOKEN = DynamicActivation(format="int8", granularity="token", dynamic=True)
RUNS = 15
KINDS = {
    "attention": ("fmha", "flash", "attention", "sdpa"),
    "quantization": ("quantize_rows", "quantize_long"),
    "INT8 products": ("scaled_product",),
    "bfloat16 products": ("gemm", "nvjet", "cutlass", "splitk", "gemv"),
}


class Stack(nn.Module):
    """Blocks one after the other."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_ideogram4 import Ideogram4TransformerBlock

        self.blocks = nn.ModuleList(
            Ideogram4TransformerBlock(4608, 12288, 18, 1e-5, 512) for _ in range(blocks)
        )

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, condition: Tensor) -> Any:
        """``[batch, tokens, 4608]`` to the same."""
        for block in self.blocks:
            x = block(x, mask, (cos, sin), condition)
        return x


def quantized(stack: Stack) -> Stack:
    """A copy with every linear but the modulation in INT8 W8A8, with smoothing factors."""
    result = copy.deepcopy(stack)
    for name, module in stack.named_modules():
        if not isinstance(module, nn.Linear) or "adaln" in name:
            continue
        factors = torch.rand(module.in_features, device="cuda") + 0.5
        stored = quantize(module.weight.float() * factors, CHANNEL)
        made = QuantizedLinear(
            module.in_features,
            module.out_features,
            CHANNEL,
            TOKEN,
            smoothing=True,
            bias=False,
            device="cuda",
        )
        assert stored.scale is not None
        assert made.smoothing is not None
        with torch.no_grad():
            made.weight.copy_(stored.codes)
            made.get_parameter("weight_scale").copy_(stored.scale)
            made.smoothing.copy_(factors)
        result.set_submodule(name, made)
    return result


def shares(run: Any) -> dict[str, float]:
    """Share of the device's time by kind of kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    total: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        name = event.key.lower()
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "the rest")
        total[kind] += event.self_device_time_total
    return {kind: time / sum(total.values()) for kind, time in sorted(total.items())}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4352)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.device("cuda"):
        stack = Stack(options.blocks).to(torch.bfloat16).eval().requires_grad_(False)
        x = torch.randn(1, options.tokens, 4608, dtype=torch.bfloat16)
        mask = torch.ones(1, 1, options.tokens, options.tokens, dtype=torch.bool)
        angles = torch.rand(1, options.tokens, 256) * 6.3
        condition = torch.randn(1, 1, 512, dtype=torch.bfloat16)
    cos, sin = (each.to(torch.bfloat16) for each in (angles.cos(), angles.sin()))
    print(torch.cuda.get_device_name(), "torch", torch.__version__, f"{options.blocks} blocks")
    outputs, results = {}, {}
    with torch.no_grad():
        for name, model in (("bf16", stack), ("int8", quantized(stack))):
            compiled = torch.compile(model, fullgraph=True)

            def run(compiled: Any = compiled) -> Tensor:
                result: Tensor = compiled(x, mask, cos, sin, condition)
                return result

            outputs[name] = run().double()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            results[name] = {
                "compiled": device_seconds(run, RUNS),
                "graph": device_seconds(graph.replay, RUNS),
                "shares": shares(run),
            }
            print(name, json.dumps(results[name]), flush=True)
    difference = (outputs["int8"] - outputs["bf16"]).norm() / outputs["bf16"].norm()
    ratios = {
        way: results["bf16"][way] / results["int8"][way]  # type: ignore[operator]
        for way in ("compiled", "graph")
    }
    print(f"int8 faster by {ratios}, relative difference {difference.item():.4f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
