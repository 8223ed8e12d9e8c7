"""Formats of blocks: gigabytes of weights encoded a second, ours beside other packages.

    python benchmarks/encoding.py --rows 2048 --columns 4096 --dtype bfloat16 --threads 1

Encoding is everything from weights in memory to what is stored: scales, of both levels, and codes,
packed. Ours measures its error besides, as a conversion does. Others run where they are installed,
on the same numbers; their codes are compared with ours where both choose the same scales. All take
turns, so that a busy moment meets everyone; a line says the median of its turns, by how much the
others are slower, and what copying the weights takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from quantrecipe.formats import choose_two_levels, effective_scales, get_format
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.dtypes import TORCH_DTYPES
from quantrecipe.formats.packing import pack
from quantrecipe.formats.records import RecordFormat
from quantrecipe.formats.transform import block_transform
from quantrecipe.schema.schemes import (
    AnyScaledWeight,
    GgmlRecords,
    Int4Group,
    Int8Channel,
    LlmInt8,
    MxFp4,
    MxFp8,
    Nf4,
    NvFp4,
    PlainWeight,
)
from quantrecipe.schema.storage import PACKINGS, Packing

Work = Callable[[], Any]

INT4 = Int4Group(format="int4", granularity="group", group_size=128)
NF4 = Nf4(format="nf4", granularity="block", block_size=64)
HIGH, LOW = PACKINGS["uint8-high-nibble"], PACKINGS["uint8-low-nibble"]
SPECS: dict[str, tuple[AnyScaledWeight, Packing | None]] = {
    "int4 by 128": (INT4, PACKINGS["int32-low-nibble"]),
    "int4 by 128, zero points": (
        INT4.model_copy(update={"symmetric": False}),
        PACKINGS["int32-low-nibble"],
    ),
    "nf4": (NF4, HIGH),
    "nf4, double-quantized": (NF4.model_copy(update={"double_quantized": True}), HIGH),
    "int8 by channel": (Int8Channel(format="int8", granularity="channel"), None),
    "llm_int8": (LlmInt8(format="llm_int8", granularity="channel"), None),
    "mxfp8": (MxFp8(format="mxfp8", granularity="group"), None),
    "mxfp4": (MxFp4(format="mxfp4", granularity="group"), LOW),
    "nvfp4": (NvFp4(format="nvfp4", granularity="group"), HIGH),
    "q8_0": (GgmlRecords(format="q8_0", granularity="block"), None),
    "q4_0": (GgmlRecords(format="q4_0", granularity="block"), None),
    "q4_k": (GgmlRecords(format="q4_k", granularity="block"), None),
    "q6_k": (GgmlRecords(format="q6_k", granularity="block"), None),
}


class Ours:
    """A weight encoded by the converter's inner loop, as many blocks at a time as threads.

    Args:
        weight: ``[rows, columns]``.
        spec: how it shall be stored.
        packing: how its codes are packed, if they are.
        threads: how many work.
        compiled: whether compiled loops may be used.
    """

    def __init__(
        self,
        weight: Tensor,
        spec: AnyScaledWeight,
        packing: Packing | None,
        threads: int,
        compiled: bool,
    ) -> None:
        self.weight, self.spec, self.packing = weight, spec, packing
        name: Any = str(weight.dtype).removeprefix("torch.")
        self.transform = block_transform(PlainWeight(format=name), spec, prefer_compiled=compiled)
        step = -(-len(weight) // threads)
        self.cuts = [slice(top, top + step) for top in range(0, len(weight), step)]
        self.pool = ThreadPoolExecutor(threads)
        grid = spec.scale_grid(*weight.shape)
        wide = len(weight), spec.code_columns(weight.shape[1])
        self.codes = torch.empty(wide, dtype=get_format(spec).code_dtype)
        self.scales = torch.empty(grid, dtype=TORCH_DTYPES[spec.grid_dtype])
        self.zeros = torch.empty(grid, dtype=torch.uint8) if spec.has_zero_points else None

    def __call__(self) -> Tensor:
        """Codes as they are stored; scales are in the memory that they are left in."""
        by = None
        if self.spec.has_two_levels:
            maxima = torch.cat(list(self.pool.map(self._measured, self.cuts)))
            stored, by = choose_two_levels(maxima, self.spec)
            self.scales = effective_scales(stored, self.spec)
        return torch.cat(list(self.pool.map(lambda cut: self._encoded(cut, by), self.cuts)))

    def _measured(self, cut: slice) -> Tensor:
        return self.transform.absmax(SourceBlock(self.weight[cut]))

    def _encoded(self, cut: slice, by: Tensor | None) -> Tensor:
        target = TargetBlock(
            self.codes[cut],
            self.scales[cut],
            None if self.zeros is None else self.zeros[cut],
            None if by is None else by[cut],
        )
        self.transform(SourceBlock(self.weight[cut]), target)
        if self.packing is None:
            return self.codes[cut].view(torch.uint8)
        return pack(self.codes[cut], self.packing)


def bitsandbytes(weight: Tensor) -> Iterator[tuple[str, str, Work, bool]]:
    """The format, the package, what encodes the weight, whether its codes are ours."""
    from bitsandbytes import functional

    def four_bits(nested: bool) -> Tensor:
        found: Tensor = functional.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=nested
        )[0]
        return found.view(len(weight), -1)

    yield "nf4", "bitsandbytes", lambda: four_bits(nested=False), True
    yield "nf4, double-quantized", "bitsandbytes", lambda: four_bits(nested=True), True
    yield (
        "llm_int8",
        "bitsandbytes",
        lambda: functional.int8_vectorwise_quant(weight)[0].view(torch.uint8),
        True,
    )


def comfy_kitchen(weight: Tensor) -> Iterator[tuple[str, str, Work, bool]]:
    """As ``bitsandbytes``."""
    from comfy_kitchen.backends.eager import quantization

    def nvfp4() -> Tensor:
        over_all = weight.abs().amax().float() / (448.0 * 6.0)
        found: Tensor = quantization.quantize_nvfp4(weight, over_all)[0]
        return found

    yield "nvfp4", "comfy-kitchen", nvfp4, True
    # Its arithmetic is in the dtype of the weight: other codes from bfloat16.
    exact = weight.dtype == torch.float32
    yield (
        "int8 by channel",
        "comfy-kitchen",
        lambda: quantization.quantize_int8_rowwise(weight)[0].view(torch.uint8),
        exact,
    )
    yield (
        "mxfp8",
        "comfy-kitchen",
        lambda: quantization.quantize_mxfp8(weight)[0].view(torch.uint8),
        True,
    )


def compressed_tensors(weight: Tensor) -> Iterator[tuple[str, str, Work, bool]]:
    """As ``bitsandbytes``. Their scales are others, so their codes are too."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    formats = {
        "int4 by 128": ("pack-quantized", "W4A16"),
        "int4 by 128, zero points": ("pack-quantized", "W4A16_ASYM"),
        "mxfp8": ("mxfp8-quantized", "MXFP8A16"),
        "mxfp4": ("mxfp4-pack-quantized", "MXFP4A16"),
        "nvfp4": ("nvfp4-pack-quantized", "NVFP4A16"),
    }
    for name, (registered, preset) in formats.items():
        scheme: Any = preset_name_to_scheme(preset, ["Linear"])
        compressor: Any = BaseCompressor.get_value_from_registry(registered)

        def encode(name: str = name, scheme: Any = scheme, compressor: Any = compressor) -> Any:
            groups = weight.view(len(weight), -1, scheme.weights.group_size)
            low, high = groups.amin(2), groups.amax(2)
            given = {"weight": weight}
            over_all = None
            if name == "nvfp4":
                over_all = generate_gparam(low.amin(), high.amax())
                given["weight_global_scale"] = over_all
            scale, zeros = calculate_qparams(low, high, scheme.weights, global_scale=over_all)
            given["weight_scale"] = scale
            if not scheme.weights.symmetric:
                given["weight_zero_point"] = zeros
            return compressor.compress(given, scheme)

        yield name, "compressed-tensors", encode, False


def torchao(weight: Tensor) -> Iterator[tuple[str, str, Work, bool]]:
    """As ``bitsandbytes``. Its scales are ``amax / 127.5``."""
    from torchao.quantization import Int8Tensor, PerRow

    yield "int8 by channel", "torchao", lambda: Int8Tensor.from_hp(weight, PerRow()), False


def gguf(weight: Tensor) -> Iterator[tuple[str, str, Work, bool]]:
    """As ``bitsandbytes``. It takes float32 alone, and has no encoder for K-quants."""
    from gguf import GGMLQuantizationType, quants

    values = weight.float().numpy()

    def encoder(name: str) -> Work:
        return lambda: torch.from_numpy(quants.quantize(values, GGMLQuantizationType[name]))

    yield "q8_0", "gguf", encoder("Q8_0"), True
    yield "q4_0", "gguf", encoder("Q4_0"), True


PEERS: dict[str, Callable[[Tensor], Iterator[tuple[str, str, Work, bool]]]] = {
    "bitsandbytes": bitsandbytes,
    "comfy_kitchen": comfy_kitchen,
    "compressed_tensors": compressed_tensors,
    "torchao": torchao,
    "gguf": gguf,
}


def codes_alone(weight: Tensor, spec: AnyScaledWeight) -> Work | None:
    """Records from float32 numbers, and nothing else; ``None`` for formats without records."""
    fmt = get_format(spec)
    if not isinstance(fmt, RecordFormat):
        return None
    fast, values = fmt.compiled(), weight.float()
    return lambda: fast.encode(values, values.new_empty(0), spec)


def in_turns(works: dict[str, Work], repeat: int) -> dict[str, float]:
    """Seconds of each, the median of its turns; one turn goes before, for what is made once."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeat + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(turns) for name, turns in seconds.items()}


def main() -> None:
    """Print a few lines for each format."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--formats", nargs="*", choices=sorted(SPECS), default=list(SPECS))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    weight = torch.randn(given.rows, given.columns, generator=torch.Generator().manual_seed(0))
    weight = (weight * 0.02).to(TORCH_DTYPES[given.dtype])
    copy = torch.empty_like(weight)
    peers = [
        peer
        for package, found in PEERS.items()
        if find_spec(package) is not None
        for peer in found(weight)
    ]
    for name in given.formats:
        spec, packing = SPECS[name]
        compiled, plain = (
            Ours(weight, spec, packing, given.threads, compiled=fast) for fast in (True, False)
        )
        alone = codes_alone(weight, spec)
        theirs = {peer: (work, same) for format, peer, work, same in peers if format == name}
        works: dict[str, Work] = {"quantrecipe": compiled, "quantrecipe, torch alone": plain}
        works |= {} if alone is None else {"quantrecipe, its error not measured": alone}
        works |= {peer: work for peer, (work, _) in theirs.items()}
        works["a copy"] = lambda: copy.copy_(weight)
        found = in_turns(works, given.repeat)
        for who, seconds in found.items():
            rate = weight.nbytes / seconds / 1e9
            line = f"{name}: {who} {rate:.3f} GB/s, {seconds / found['quantrecipe']:.2f} of ours"
            if who in theirs and theirs[who][1]:
                line += f", same codes: {torch.equal(theirs[who][0](), compiled())}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
