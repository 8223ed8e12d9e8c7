"""What the benchmarks share: a measured child process, plain disk traffic, the machine in words.

This module and whatever imports it keep clear of torch and NumPy. Linux hands a child's peak
memory over from the process it was forked from, so the parent has to stay smaller than any child.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

LAYER_WEIGHTS, EDGE_WEIGHTS = 264_582_000, 294_000_000
"""Weights in a branch of Ideogram 4 at full width: in a layer, and outside the layers."""

_BLOCK = 16 << 20
_PAGE_CACHE_ADVICE = getattr(os, "POSIX_FADV_DONTNEED", None)
_PREALLOCATE = getattr(os, "posix_fallocate", None)


@dataclass(frozen=True, slots=True)
class Run:
    """A child process that ended.

    Attributes:
        seconds: wall time.
        cpu_seconds: user and system time of it and its children.
        peak_rss: most resident memory of it or of any one of its children, in bytes.
        exit_status: 0 where it went well, negative for a signal.
    """

    seconds: float
    cpu_seconds: float
    peak_rss: int
    exit_status: int = 0


def run(command: Sequence[str | Path], quiet: bool = True) -> Run:
    """Run a command to its end and measure it.

    Args:
        command: program and arguments.
        quiet: keep its standard output out of ours.

    Raises:
        SystemExit: it failed.
    """
    measured = _measured(command, subprocess.DEVNULL if quiet else None, None)
    if measured.exit_status:
        line = " ".join(map(str, command))
        raise SystemExit(f"{line}: exit status {measured.exit_status}")
    return measured


def attempt(
    command: Sequence[str | Path],
    log: Path,
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> Run:
    """Run a command that may fail, and measure it.

    Args:
        command: program and arguments.
        log: file for all that it prints.
        environment: all of its environment variables; ours where it is None.
        limit: seconds after which it is killed.
    """
    with log.open("wb") as file:
        return _measured(command, file, subprocess.STDOUT, environment, limit)


def _measured(
    command: Sequence[str | Path],
    output: int | BinaryIO | None,
    errors: int | None,
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> Run:
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment
    )
    timer = threading.Timer(limit or 0, process.kill)
    if limit:
        timer.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Run(seconds, cpu_seconds, usage.ru_maxrss * unit, process.returncode)


def flush(folder: Path) -> float:
    """Seconds to have all files below a folder on the disk; none where they are there already."""
    started = time.perf_counter()
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return time.perf_counter() - started


def console_script(name: str) -> Path:
    """A command of the environment that runs this."""
    return Path(sys.executable).with_name(name)


def forget_cached(paths: Iterable[Path]) -> None:
    """Write files out and drop them from the page cache where that can be, so reads are cold."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            if _PAGE_CACHE_ADVICE is not None:
                os.posix_fadvise(descriptor, 0, 0, _PAGE_CACHE_ADVICE)
        finally:
            os.close(descriptor)


def plain_copy(
    sources: Sequence[Path], output: Path, output_bytes: int, preallocate: bool = False
) -> float:
    """Seconds to read files in order and write ``output_bytes`` beside it, fsync included.

    One thread, one reused buffer of 16 MiB: what the disk asks of anyone who does nothing else.

    Args:
        sources: files to read.
        output: file to write.
        output_bytes: how many bytes it gets.
        preallocate: have the system set its blocks aside first, where it can.
    """
    buffer = bytearray(_BLOCK)
    view = memoryview(buffer)
    total = sum(path.stat().st_size for path in sources)
    seen = written = 0
    started = time.perf_counter()
    with output.open("wb", buffering=0) as target:
        if preallocate and _PREALLOCATE is not None:
            _PREALLOCATE(target.fileno(), 0, output_bytes)
        for path in sources:
            with path.open("rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    seen += count
                    due = output_bytes * seen // total
                    written += _write(target.fileno(), view, due - written)
        os.fsync(target.fileno())
    seconds = time.perf_counter() - started
    if written != output_bytes:
        raise RuntimeError(f"wrote {written} of {output_bytes} bytes")
    return seconds


def _write(descriptor: int, view: memoryview, count: int) -> int:
    left = count
    while left:
        left -= os.write(descriptor, view[: min(left, len(view))])
    return count


def files_below(folder: Path) -> list[Path]:
    """The safetensors files of a folder and its folders, sorted."""
    return sorted(folder.rglob("*.safetensors"))


def total_bytes(paths: Iterable[Path]) -> int:
    """Their sizes, added up."""
    return sum(path.stat().st_size for path in paths)


def require_disk(folder: Path, needed: int) -> None:
    """Refuse to start on a disk with less than ``needed`` bytes free.

    Raises:
        SystemExit: there is less.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; "
            "choose another folder with --work, or a smaller --scale"
        )


def machine() -> str:
    """The machine in one line: processor, cores, memory, system, Python."""
    processor = _first_value(Path("/proc/cpuinfo"), "model name") or platform.processor()
    memory = _first_value(Path("/proc/meminfo"), "MemTotal")
    size = f", {int(memory.split()[0]) * 1024 / 1e9:.0f} GB" if memory else ""
    system = f"{platform.system()} {platform.release()}"
    cores = os.cpu_count()
    return f"{processor}, {cores} cores{size}, {system}, Python {platform.python_version()}"


def note(text: str) -> None:
    """Say what happens, beside the results."""
    print(text, file=sys.stderr, flush=True)


def _first_value(path: Path, key: str) -> str | None:
    if not path.exists():
        return None
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
