"""What the tests give to workers: functions that they can import by name."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path

from quantrecipe.checkpoint.errors import SourceError
from quantrecipe.schema.problems import InvalidInput, Problem

PROBLEM = Problem("non-finite", "a NaN at index [3, 4]", "Repair it.", tensor="blocks.0.weight")


def add(first: int, second: int = 1) -> int:
    return first + second


def rest(seconds: float, mark: str = "") -> int:
    """Sleep; ``mark``, if given, is a file that gets a line when it begins."""
    if mark:
        with Path(mark).open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
    time.sleep(seconds)
    return os.getpid()


def rest_once(mark: str) -> list[int]:
    """Sleep for very long the first time; after that, who has begun this."""
    first = not Path(mark).exists()
    rest(300 if first else 0, mark)
    return [int(line) for line in Path(mark).read_text(encoding="utf-8").split()]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(mark: str) -> None:
    rest(0, mark)
    raise InvalidInput(PROBLEM)


def fail_to_read() -> None:
    raise SourceError(Path("a.safetensors"), OSError(errno.EIO, "input/output error"), "w")


def run_full() -> None:
    raise OSError(errno.ENOSPC, "no space left on device", "out/a.safetensors")


def environment() -> dict[str, str]:
    return dict(os.environ)


def modules() -> list[str]:
    return sorted(sys.modules)
