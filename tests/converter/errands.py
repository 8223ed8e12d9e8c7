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
from tests.converter.waiting import LIMIT, wait_until

PROBLEM = Problem("non-finite", "a NaN at index [3, 4]", "Repair it.", tensor="blocks.0.weight")


def add(first: int, second: int = 1) -> int:
    return first + second


def note(mark: str = "") -> int:
    """Who runs it; ``mark``, if given, is a file that gets a line with that."""
    if mark:
        with Path(mark).open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
    return os.getpid()


def note_and_wait(mark: str, gate: str) -> int:
    """As ``note``, and ends once there is a file ``gate``."""
    note(mark)
    wait_until(Path(gate).exists)
    return os.getpid()


def rest_once(mark: str) -> list[int]:
    """Sleep for very long the first time; after that, who has begun this."""
    first = not Path(mark).exists()
    note(mark)
    if first:
        time.sleep(LIMIT)
    return [int(line) for line in Path(mark).read_text(encoding="utf-8").split()]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(mark: str) -> None:
    note(mark)
    raise InvalidInput(PROBLEM)


def fail_to_read() -> None:
    raise SourceError(Path("a.safetensors"), OSError(errno.EIO, "input/output error"), "w")


def run_full() -> None:
    raise OSError(errno.ENOSPC, "no space left on device", "out/a.safetensors")


def environment() -> dict[str, str]:
    return dict(os.environ)


def modules() -> list[str]:
    return sorted(sys.modules)
