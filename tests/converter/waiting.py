"""Waiting for what must happen, however busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

LIMIT: Final = 600
"""Seconds; only what would hang for ever takes so long."""


def wait_until(holds: Callable[[], object]) -> None:
    """Wait until it holds.

    Raises:
        AssertionError: it never does.
    """
    deadline = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
