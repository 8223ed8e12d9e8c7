"""Output files at their final sizes, and writing into them, from any thread, process or machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any

from quantrecipe.checkpoint.closing import Closing
from quantrecipe.checkpoint.durable import output_error, reserve, sync_data, sync_folder
from quantrecipe.schema.problems import OutputError
from quantrecipe.schema.tensors import OutputFilePlan

ReadableBuffer = Any
"""A contiguous buffer: ``bytes``, ``bytearray``, ``memoryview``, NumPy array."""


def lay_out(plans: Iterable[OutputFilePlan], folder: Path) -> None:
    """Give every file of an output its header and its final size, with room on the disk for it.

    A full disk shows here, before any work. A file that is there already in its final size and
    with its header is left as it is: it is what an interrupted conversion got done. The payload of
    a new file is bytes of zero, which readers take for data; whoever publishes it must know that
    every byte was written.

    Args:
        plans: the files, down to every offset.
        folder: they lie below it; it belongs to nobody else.

    Raises:
        OutputError: there is no room for them, or one cannot be created.
        ValueError: a path twice.
    """
    wanted: dict[str, OutputFilePlan] = {}
    for plan in plans:
        if wanted.setdefault(plan.path, plan) is not plan:
            raise ValueError(f"two files are called {plan.path!r}")
    new = [plan for plan in wanted.values() if not _is_laid_out(plan, folder)]
    _check_room(folder, sum(plan.size for plan in new))
    for plan in new:
        path = locate(folder, plan.path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with path.open("xb") as file:
                file.write(plan.header)
                file.flush()
                reserve(file.fileno(), plan.size)
        except OSError as error:
            raise output_error(path, error, plan.size) from error
    for parent in {locate(folder, plan.path).parent for plan in new}:
        try:
            sync_folder(parent)
        except OSError as error:
            raise output_error(parent, error) from error


def locate(folder: Path, path: str) -> Path:
    """A file of an output, from its path with ``/``."""
    return folder.joinpath(*path.split("/"))


class OutputFiles(Closing):
    """Positional writes into files that are there, each opened at its first write.

    Args:
        folder: the files lie below it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, _OpenFile] = {}
        self._lock = Lock()

    def write(self, path: str, position: int, buffer: ReadableBuffer) -> None:
        """Write all of ``buffer`` to a file, from byte ``position`` of it on.

        Raises:
            OutputError: the system could not write.
        """
        with memoryview(buffer) as given:
            if not given.nbytes:
                return
            try:
                with given.cast("B") as view:
                    self._file(path).write(view, position)
            except OSError as error:
                raise output_error(locate(self.folder, path), error) from error

    def sync(self, paths: Iterable[str]) -> None:
        """Push what was written to these files to the disk.

        Raises:
            OutputError: the system could not.
        """
        for path in paths:
            try:
                sync_data(self._file(path).file.fileno())
            except OSError as error:
                raise output_error(locate(self.folder, path), error) from error

    def close(self, paths: Iterable[str] | None = None) -> None:
        """Close these files, or all; a later write opens them again."""
        with self._lock:
            for path in list(self._open if paths is None else paths):
                opened = self._open.pop(path, None)
                if opened is not None:
                    opened.file.close()

    def _file(self, path: str) -> _OpenFile:
        with self._lock:
            opened = self._open.get(path)
            if opened is None:
                file = locate(self.folder, path).open("rb+", buffering=0)
                opened = self._open[path] = _OpenFile(file)
            return opened


class _OpenFile:
    """An open file, written to by one thread at a time.

    The system lets in one at a time as well, but those who wait there use up a core each.
    """

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self._writing = Lock()

    def write(self, view: memoryview, position: int) -> None:
        done = 0
        with self._writing:
            while done < len(view):
                with view[done:] as rest:
                    if hasattr(os, "pwrite"):
                        done += os.pwrite(self.file.fileno(), rest, position + done)
                    else:
                        self.file.seek(position + done)
                        done += self.file.write(rest)


def _is_laid_out(plan: OutputFilePlan, folder: Path) -> bool:
    path = locate(folder, plan.path)
    try:
        if path.is_symlink() or path.stat().st_size != plan.size:
            return False
        with path.open("rb") as file:
            return file.read(len(plan.header)) == plan.header
    except OSError:
        return False


def _check_room(folder: Path, needed: int) -> None:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise output_error(folder, error) from error
    if free < needed:
        raise OutputError(
            f"{folder}: needs {needed:,} bytes, and {free:,} are free there\n"
            "  Make room, or choose another folder."
        )
