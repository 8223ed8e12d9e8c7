"""Making work last: to the disk, then into the journal, so that another attempt goes on from it."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, Final

from quantrecipe.checkpoint import Journal, OutputFiles

# A batch is written down when it is this large or this old.
_BATCH_BYTES: Final = 512 << 20
_BATCH_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True)
class Done:
    """Something that was done.

    Attributes:
        record: says so in the journal.
        files: output files to push to the disk before.
        nbytes: how much was written.
        whole: output files to close after that, for nothing is left to write to them.
    """

    record: dict[str, Any]
    files: frozenset[str] = field(default=frozenset())
    nbytes: int = 0
    whole: frozenset[str] = field(default=frozenset())


class Keeper:
    """Pushes files to the disk and writes the journal, in batches, in a thread of its own.

    Nobody else may close files that this thread may be pushing.

    Args:
        journal: takes the records.
        output: the files.
    """

    def __init__(self, journal: Journal, output: OutputFiles) -> None:
        self._journal = journal
        self._output = output
        self._queue: queue.SimpleQueue[Done | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = Thread(target=self._run, name="quantrecipe-keeper", daemon=True)
        self._thread.start()

    def add(self, done: Done) -> None:
        """Have something written down, soon.

        Raises:
            OutputError: something earlier could not be.
        """
        self.check()
        self._queue.put(done)

    def check(self) -> None:
        """Raise what went wrong in the thread.

        Raises:
            OutputError: the system could not write.
        """
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Write down what there is, and end.

        Raises:
            OutputError: the system could not write.
        """
        self._queue.put(None)
        self._thread.join()
        self.check()

    def _run(self) -> None:
        try:
            open_end = True
            while open_end:
                open_end = self._batch()
        except BaseException as error:  # noqa: BLE001 - raised where it can be handled
            self._failure = error

    def _batch(self) -> bool:
        """Gather and write down one batch; false when it was the last."""
        batch: list[Done] = []
        until: float | None = None
        while True:
            wait = None if until is None else max(0.0, until - time.monotonic())
            try:
                done = self._queue.get(timeout=wait)
            except queue.Empty:
                self._write(batch)
                return True
            if done is None:
                self._write(batch)
                return False
            batch.append(done)
            until = until or time.monotonic() + _BATCH_SECONDS
            if sum(each.nbytes for each in batch) >= _BATCH_BYTES:
                self._write(batch)
                return True

    def _write(self, batch: Iterable[Done]) -> None:
        kept = list(batch)
        self._output.sync(sorted({file for done in kept for file in done.files}))
        self._output.close({file for done in kept for file in done.whole})
        if kept:
            self._journal.append(done.record for done in kept)
