"""Progress in bytes, with rate and time left, on stderr."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Final, Self

from quantrecipe.cli.tables import human_bytes

_EVERY_SECONDS: Final = {True: 0.2, False: 10.0}
_WIDTH: Final = 24


class ProgressLine:
    """One line that is drawn over itself on a terminal, and a line every ten seconds in a log.

    Args:
        total: bytes of source tensors.
        quiet: say nothing.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._next = self._started if self._terminal else self._started + _EVERY_SECONDS[False]
        self._quiet = quiet
        self._drawn = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._wipe()

    def note(self, text: str) -> None:
        """Say something in a line of its own."""
        self._wipe()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def _wipe(self) -> None:
        if self._drawn:
            sys.stderr.write("\r" + " " * self._drawn + "\r")
            sys.stderr.flush()
            self._drawn = 0

    def advance(self, count: int, name: str) -> None:
        """``count`` more bytes are done with; they were of ``name``."""
        self._done += count
        now = time.monotonic()
        if self._quiet or now < self._next:
            return
        self._next = now + _EVERY_SECONDS[self._terminal]
        text = self._text(now, name)
        if self._terminal:
            # A line that wraps could not be drawn over.
            text = text[: shutil.get_terminal_size().columns - 1]
            sys.stderr.write("\r" + text.ljust(self._drawn))
            self._drawn = len(text)
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def _text(self, now: float, name: str) -> str:
        share = min(1.0, self._done / self._total) if self._total else 1.0
        rate = self._done / max(now - self._started, 1e-9)
        left = max(0.0, (self._total - self._done) / rate) if rate else 0.0
        filled = round(share * _WIDTH)
        bar = "#" * filled + "." * (_WIDTH - filled)
        return (
            f"{share:4.0%} [{bar}] {human_bytes(self._done)} of {human_bytes(self._total)}, "
            f"{human_bytes(round(rate))}/s, {human_time(left)} left  {name[-40:]}"
        )


def silence_the_client() -> None:
    """Have the Hub's client draw no bars of its own."""
    from huggingface_hub import utils

    utils.disable_progress_bars()  # type: ignore[attr-defined]


def human_time(seconds: float) -> str:
    """``0:42``, ``12:05`` or ``1:02:33``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
