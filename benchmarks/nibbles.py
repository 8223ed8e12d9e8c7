"""int4 and nf4 on one core: gigabytes of float32 weights a second, ours beside bitsandbytes.

    python benchmarks/nibbles.py --rows 2048 --columns 4096 --repeat 5

Encoding is everything from weights in memory to scales and packed codes, decoding the way back: the
median of turns. bitsandbytes is measured where it is installed, on the same numbers, and its bytes
are compared with ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from quantrecipe.formats import Quantized, dequantize, quantize
from quantrecipe.formats.packing import pack, unpack
from quantrecipe.schema.schemes import AnyScaledWeight, Int4Group, Nf4
from quantrecipe.schema.storage import PACKINGS, Packing

INT4 = Int4Group(format="int4", granularity="group", group_size=128)
NF4 = Nf4(format="nf4", granularity="block", block_size=64)
LOW, HIGH = PACKINGS["int32-low-nibble"], PACKINGS["uint8-high-nibble"]
SPECS: dict[str, tuple[AnyScaledWeight, Packing]] = {
    "int4 by 128": (INT4, LOW),
    "int4 by 128, zero points": (INT4.model_copy(update={"symmetric": False}), LOW),
    "nf4": (NF4, HIGH),
}


def encode(weight: Tensor, spec: AnyScaledWeight, packing: Packing) -> tuple[Tensor, Quantized]:
    """Packed codes, and what they were packed from."""
    stored = quantize(weight, spec)
    return pack(stored.codes, packing), stored


def decode(packed: Tensor, stored: Quantized, spec: AnyScaledWeight, packing: Packing) -> Tensor:
    """The weight as float32."""
    codes = unpack(packed, packing, stored.codes.shape[1])
    return dequantize(codes, stored.scale, spec, zero_point=stored.zero_point)


def speed(work: Callable[[], object], nbytes: int, repeat: int) -> float:
    """Gigabytes a second, the median."""
    work()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return nbytes / statistics.median(seconds) / 1e9


def main() -> None:
    """Print one line for each format and program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    weight = torch.randn(given.rows, given.columns, generator=torch.Generator().manual_seed(0))
    size = weight.nbytes
    for name, (spec, packing) in SPECS.items():
        packed, stored = encode(weight, spec, packing)
        into = speed(partial(encode, weight, spec, packing), size, given.repeat)
        back = speed(partial(decode, packed, stored, spec, packing), size, given.repeat)
        print(f"{name}: encode {into:.3f} GB/s, decode {back:.3f} GB/s")
    if find_spec("bitsandbytes") is None:
        print("bitsandbytes is not installed")
        return
    from bitsandbytes import functional

    def theirs() -> tuple[Tensor, Any]:
        found: tuple[Tensor, Any] = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        return found

    packed, state = theirs()
    into = speed(theirs, size, given.repeat)
    back = speed(lambda: functional.dequantize_4bit(packed, state), size, given.repeat)
    same = torch.equal(encode(weight, NF4, HIGH)[0].reshape(-1, 1), packed)
    print(f"bitsandbytes nf4: encode {into:.3f} GB/s, decode {back:.3f} GB/s, same bytes: {same}")


if __name__ == "__main__":
    main()
