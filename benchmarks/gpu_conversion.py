"""Conversion on GPUs: GB/s from end to end, beside what copying and the disk can do.

    python benchmarks/gpu_conversion.py --work /a/folder/on/a/disk --gigabytes 10

Writes a source of bfloat16 weights in memory (a tmpfs) and on the disk, and converts it to INT8 by
channel on the CPU, on one GPU, and on two where there are two. Beside it, in the same run: pinned
memory to the GPU and back, quantizing on the GPU alone, plain reading and writing. Every output has
the same SHA-256. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _measure import machine, plain_copy

from quantrecipe.checkpoint import OutputFiles, lay_out
from quantrecipe.converter import Means, carry_out, check_devices, find_converter, plan
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.transform import block_transform
from quantrecipe.schema.placement import place
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.schemes import Int8Channel, PlainWeight
from quantrecipe.schema.tensors import OutputTensor
from quantrecipe.schema.validation import parse_recipe

RECIPE = {
    "kind": "recipe",
    "version": 1,
    "name": "gpu",
    "source": {"layout": "plain"},
    "schemes": {"w8": {"weight": {"format": "int8", "granularity": "channel"}}},
    "rules": [{"modules": ["**"], "scheme": "w8"}],
    "target": {"layout": "int8-scaled", "max_shard_size": "500MB"},
}
SHAPES = ((13824, 4608), (4608, 4608), (12288, 4608), (12288, 4608), (4608, 12288))
SHARDS = 4


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(), help="a folder on a disk")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="one in memory")
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--jobs", type=int, nargs="*", default=[4, 8, 16])
    options = parser.parse_args()
    count = torch.cuda.device_count()
    print(machine())
    print(f"{count} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}\n")
    print_limits()
    for name, place_ in (("memory", options.memory), ("disk", options.work)):
        with tempfile.TemporaryDirectory(prefix="gpu-", dir=place_) as folder:
            report(name, Path(folder), options.gigabytes, count, options.jobs)


def print_limits() -> None:
    """Copies and computation alone, GB/s of bfloat16 weights."""
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    up = rate(lambda: device.copy_(host, non_blocking=True), 1 << 28)
    down = rate(lambda: host.copy_(device, non_blocking=True), 1 << 28)
    print(f"pinned memory to the GPU {up:.1f} GB/s, back {down:.1f} GB/s")
    target = Int8Channel.model_validate({"format": "int8", "granularity": "channel"})
    source = PlainWeight.model_validate({"format": "bfloat16"})
    transform = block_transform(source, target)
    weight = torch.randn(6912, 4608, device="cuda").bfloat16()
    codes = torch.empty(weight.shape, dtype=torch.int8, device="cuda")
    scales = torch.empty(len(weight), 1, device="cuda")
    # The CPU's loops are compiled here, if they were not before, and not while they are measured.
    block_transform(source, target)(
        SourceBlock(weight[:64].cpu()), TargetBlock(codes[:64].cpu(), scales[:64].cpu())
    )
    blocks = SourceBlock(weight), TargetBlock(codes, scales)
    alone = rate(lambda: transform(*blocks), weight.nbytes)
    print(f"bfloat16 -> int8 with errors measured, on the GPU alone: {alone:.1f} GB/s\n")


def rate(work: Callable[[], object], nbytes: int, times: int = 10) -> float:
    """GB/s, the best of several."""
    best = float("inf")
    for _ in range(times):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return nbytes / best / 1e9


def report(name: str, work: Path, gigabytes: float, count: int, jobs: list[int]) -> None:
    """One table for one place."""
    source = work / "source"
    write_source(source, gigabytes)
    planned = plan(parse_recipe(json.dumps(RECIPE), "gpu"), source)
    files = sorted(source.iterdir())
    size = planned.source_bytes / 1e9
    seconds = plain_copy(files, work / "copy", planned.output_bytes)
    (work / "copy").unlink()
    print(f"In {name}: {size:.1f} GB of bfloat16 in {len(files)} files, warm.\n")
    print("| | threads | seconds | GB/s | units done after, s | GB/s until then |")
    print("|---|---:|---:|---:|---:|---:|")
    print(f"| plain read and write, 1 thread | 1 | {seconds:.2f} | {size / seconds:.2f} | | |")
    runs = [("cpu", max(jobs))] + [("cuda", each) for each in jobs]
    if count > 1:
        runs += [("cuda:0,cuda:1", each) for each in jobs]
    digests = set()
    for device, threads in runs:
        whole, working, digest = convert(planned, work / "out", device, threads)
        digests.add(digest)
        print(
            f"| `--device {device}` | {threads} | {whole:.2f} | {size / whole:.2f} "
            f"| {working:.2f} | {size / working:.2f} |",
            flush=True,
        )
    assert len(digests) == 1, digests
    print("\nThe same SHA-256 from all.\n")


def convert(
    planned: Plan, out: Path, devices: str, jobs: int
) -> tuple[float, float, tuple[str, ...]]:
    """Seconds in all, seconds until the last unit was done, and the digests of the output."""
    last = [0.0]

    def progress(nbytes: int, name: str) -> None:
        last[0] = time.perf_counter()

    started = time.perf_counter()
    means = Means(jobs=jobs, devices=check_devices(devices), progress=progress)
    done = carry_out(planned, find_converter("streaming"), out, means)
    whole = time.perf_counter() - started
    shutil.rmtree(out)
    return whole, last[0] - started, tuple(output.sha256 for output in done.lock.outputs)


def write_source(folder: Path, gigabytes: float) -> None:
    """Weights in the shapes of Ideogram 4, the same random numbers again and again."""
    folder.mkdir()
    one = sum(rows * columns for rows, columns in SHAPES) * 2
    layers = max(1, round(gigabytes * 1e9 / one))
    tensors = [
        OutputTensor(f"layers.{layer}.linear{number}.weight", "bfloat16", shape)
        for layer in range(layers)
        for number, shape in enumerate(SHAPES)
    ]
    noise = (torch.randn(1 << 26) * 0.02).bfloat16().view(torch.uint8).numpy()
    limit = 2 * sum(one.nbytes for one in tensors) // (2 * SHARDS) + (200 << 20)
    plans, _, _ = place(tensors, {"format": "pt"}, "model.safetensors", limit)
    lay_out(plans, folder)
    with OutputFiles(folder) as files:
        for file in plans:
            for tensor in file.tensors.values():
                files.write(file.path, file.offsets[tensor.name], noise[: tensor.nbytes])
        files.sync(file.path for file in plans)
    names = {name: file.path for file in plans for name in file.tensors}
    index = {"metadata": {"total_size": one * layers}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
