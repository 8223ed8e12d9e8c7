"""Loading a model: seconds and memory beside ``safetensors.torch.load_file``, cold and warm.

    python benchmarks/loading.py --device cuda --gb 10
    python benchmarks/loading.py --device cpu --gb 1 --cold

Writes an INT8 checkpoint of that size, in shards, and loads it in processes of their own: as
tensors with safetensors (which on the CPU only maps the file), and into a model on the meta device
with ``load_model``. Pinned memory counts as the host's. Prints a Markdown table, or JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _measure import files_below, forget_cached, machine, require_disk, total_bytes

from quantrecipe.schema.placement import encode_header, file_order
from quantrecipe.schema.tensors import OutputTensor

SHAPES = ((13824, 4608), (4608, 4608), (12288, 4608), (12288, 4608), (4608, 12288))
SHARDS = 4
LOADERS = ("load_file", "load_model")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gb", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--checkpoint", type=Path, help="one in layout int8-scaled to load instead")
    parser.add_argument("--runs", type=int, default=3, help="warm runs; the fastest counts")
    parser.add_argument("--cold", action="store_true", help="also with an empty page cache")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--child", choices=LOADERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.checkpoint, options.device)))
        return
    folder = options.checkpoint or write(options.work, int(options.gb * 1e9))
    try:
        report(folder, options)
    finally:
        if options.checkpoint is None:
            shutil.rmtree(folder)


def write(work: Path, size: int) -> Path:
    """A checkpoint of about ``size`` bytes in layout ``int8-scaled``."""
    require_disk(work, size + (1 << 30))
    folder = Path(tempfile.mkdtemp(prefix="loading-", dir=work))
    noise = os.urandom(1 << 20) * 64
    for shard in range(SHARDS):
        tensors: list[OutputTensor] = []
        while sum(tensor.nbytes for tensor in tensors) < size // SHARDS:
            index = len(tensors) // 2
            rows, columns = SHAPES[index % len(SHAPES)]
            name = f"blocks.{shard}.{index}"
            tensors.append(OutputTensor(f"{name}.weight", "int8", (rows, columns)))
            tensors.append(OutputTensor(f"{name}.weight_scale", "float32", (rows, 1)))
        ordered = file_order(tensors)
        with (folder / f"model-{shard}.safetensors").open("wb", buffering=0) as file:
            file.write(encode_header(ordered, {"format": "pt"}))
            for tensor in ordered:
                one = b"\0\0\x80\x3f" * (tensor.nbytes // 4) if "scale" in tensor.name else noise
                file.write(memoryview(one)[: tensor.nbytes])
    return folder


def report(folder: Path, options: argparse.Namespace) -> None:
    """Load it every way, and print what that took."""
    files = files_below(folder)
    size = total_bytes(files)
    rows: list[dict[str, Any]] = []
    for cold in (False, True) if options.cold else (False,):
        for loader in LOADERS:
            runs = []
            for _ in range(1 if cold else options.runs):
                if cold:
                    forget_cached(files)
                runs.append(child(loader, folder, options.device))
            best = min(runs, key=lambda run: run["seconds"])
            best |= {"cache": "cold" if cold else "warm", "gb_s": size / 1e9 / best["seconds"]}
            rows.append(best)
    if options.json:
        for row in rows:
            print(json.dumps({"device": options.device, "bytes": size, **row}))
        return
    print(f"{machine()}; {size / 1e9:.2f} GB in {len(files)} files to {options.device}\n")
    print("| | cache | seconds | GB/s | host growth, MB | device peak / size | device in use, GB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        peak, used = row["device_peak"], row["device_used"]
        print(
            f"| {row['loader']} | {row['cache']} | {row['seconds']:.2f} | {row['gb_s']:.1f} "
            f"| {row['host_growth'] / 1e6:,.0f} | {f'{peak / size:.3f}' if peak else '-'} "
            f"| {f'{used / 1e9:.2f}' if used else '-'} |"
        )


def child(loader: str, folder: Path, device: str) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--child", loader, "--device", device]
    ran = subprocess.run(
        [*command, "--checkpoint", folder], stdout=subprocess.PIPE, check=True, text=True
    )
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def measure(loader: str, folder: Path, device: str) -> dict[str, Any]:
    """Load ``folder`` once, with all libraries and the device awake before."""
    import torch

    on_gpu = torch.device(device).type == "cuda"
    load = _load_file(folder, device) if loader == "load_file" else _load_model(folder, device)
    if on_gpu:
        torch.ones(1 << 20, device=device).sum().item()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    free = torch.cuda.mem_get_info()[0] if on_gpu else 0
    before = _status("RssAnon") + _status("RssShmem")
    peak = _Peak()
    started = time.perf_counter()
    kept = load()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    found = {
        "loader": loader,
        "seconds": seconds,
        "host_growth": peak.stop() - before,
        "device_peak": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "device_used": free - torch.cuda.mem_get_info()[0] if on_gpu else 0,
    }
    del kept
    return found


def _load_file(folder: Path, device: str) -> Callable[[], object]:
    from safetensors.torch import load_file

    return lambda: [load_file(path, device=device) for path in files_below(folder)]


def _load_model(folder: Path, device: str) -> Callable[[], object]:
    import torch
    from torch import nn

    from quantrecipe.checkpoint import read_header
    from quantrecipe.loaders import load_model

    model = nn.Module()
    for path in files_below(folder):
        for name, info in read_header(path).tensors.items():
            if name.endswith(".weight"):
                rows, columns = info.shape
                linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=torch.bfloat16)
                *parents, last = name.removesuffix(".weight").split(".")
                owner = model
                for parent in parents:
                    if parent not in owner._modules:
                        owner.add_module(parent, nn.Module())
                    owner = owner.get_submodule(parent)
                owner.add_module(last, linear)
    parts = {"model": "*.safetensors"}
    return lambda: load_model(model, folder, device=device, layout="int8-scaled", parts=parts)


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes; 0 where there is none."""
    return next(_fields(field), 0)


def _fields(field: str) -> Iterator[int]:
    path = Path("/proc/self/status")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(f"{field}:"):
            yield int(line.split()[1]) * 1024


class _Peak:
    """The most memory that is not of files, looked at a hundred times a second."""

    def __init__(self) -> None:
        self._most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, _status("RssAnon") + _status("RssShmem"))
            if self._ended.wait(0.01):
                return

    def stop(self) -> int:
        """End looking, and say what it was in bytes."""
        self._ended.set()
        self._thread.join()
        return self._most


if __name__ == "__main__":
    main()
