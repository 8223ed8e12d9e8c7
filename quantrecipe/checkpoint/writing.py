"""Writing tensors at their planned offsets, in any order, from any number of threads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from quantrecipe.checkpoint.coverage import Coverage
from quantrecipe.checkpoint.durable import output_error, reserve, sync_descriptor
from quantrecipe.checkpoint.errors import some
from quantrecipe.schema.problems import OutputError
from quantrecipe.schema.tensors import OutputFilePlan

ReadableBuffer = Any
"""A contiguous buffer: ``bytes``, ``bytearray``, ``memoryview``, NumPy array."""


class FileWriter:
    """One safetensors file in the making.

    It is created with its header and its final size; its payload is bytes of zero until written,
    which readers take for data. ``finish`` therefore insists on every byte having been written
    exactly once.

    Args:
        plan: the file, down to every offset.
        folder: ``plan.path`` lies below it.

    Raises:
        OutputError: it exists, or there is no room for it.
    """

    def __init__(self, plan: OutputFilePlan, folder: Path) -> None:
        self.plan = plan
        self.path = folder.joinpath(*plan.path.split("/"))
        self._covered = {name: Coverage(tensor.nbytes) for name, tensor in plan.tensors.items()}
        self._left = plan.size - len(plan.header)
        self._file: FileIO | None = None
        self._finished = False
        self._lock = Lock()
        self._seeking = Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("xb") as file:
                file.write(plan.header)
                file.flush()
                reserve(file.fileno(), plan.size)
        except OSError as error:
            raise output_error(self.path, error, plan.size) from error

    @property
    def complete(self) -> bool:
        """Whether every byte of every tensor has been written."""
        return self._left == 0

    def write(self, tensor: str, offset: int, buffer: ReadableBuffer) -> None:
        """Write all of ``buffer`` to a tensor, from byte ``offset`` of it on.

        Raises:
            ValueError: there is no such tensor, the range reaches outside of it, or it was written
                to before.
            OutputError: the system could not write.
        """
        covered = self._covered.get(tensor)
        if covered is None:
            raise ValueError(f"{self.plan.path} holds no tensor {tensor!r}")
        with memoryview(buffer) as given:
            size = given.nbytes
            try:
                with self._lock:
                    covered.claim(offset, offset + size)
                    if size == 0:  # fine even after the last byte, which finishes the file
                        return
                    if self._finished:
                        raise ValueError("the file is finished")
                    file = self._file
                    if file is None:
                        file = self._file = self.path.open("rb+", buffering=0)
                with given.cast("B") as view:
                    self._write_all(file, view, self.plan.offsets[tensor] + offset)
            except ValueError as error:
                raise ValueError(f"{self.plan.path} [{tensor}]: {error}") from None
            except OSError as error:
                raise output_error(self.path, error, self.plan.size) from error
        with self._lock:
            self._left -= size

    def finish(self) -> None:
        """Push the file to the disk and close it.

        Raises:
            ValueError: a tensor was not written completely.
            OutputError: the system could not write.
        """
        with self._lock:
            if self._finished:
                return
            if self._left:
                torn = [name for name, covered in self._covered.items() if not covered.complete]
                raise ValueError(
                    f"{self.plan.path}: {self._left:,} bytes were never written, of "
                    f"{some(torn) if torn else 'ranges whose writing failed'}"
                )
            try:
                with self._file or self.path.open("rb+", buffering=0) as file:
                    sync_descriptor(file.fileno())
            except OSError as error:
                raise output_error(self.path, error, self.plan.size) from error
            self._file = None
            self._finished = True

    def close(self) -> None:
        """Close the file as it is; for leaving after an error."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
            self._finished = True

    def _write_all(self, file: FileIO, view: memoryview, position: int) -> None:
        done = 0
        while done < len(view):
            with view[done:] as rest:
                if hasattr(os, "pwrite"):
                    done += os.pwrite(file.fileno(), rest, position + done)
                else:
                    with self._seeking:
                        file.seek(position + done)
                        done += file.write(rest)


class OutputWriter:
    """All safetensors files of an output.

    All files are created before the first write, so a full disk shows at the start; each is opened
    at its first write, and finished as soon as it is complete, so few are open at a time.

    Args:
        plans: the files; two of them may hold tensors of the same name.
        folder: where they go; usually that of a ``Staging``.

    Raises:
        OutputError: there is no room for them, or one cannot be created.
        ValueError: a path twice.
    """

    def __init__(self, plans: Iterable[OutputFilePlan], folder: Path) -> None:
        plans = tuple(plans)
        self._files: dict[str, FileWriter] = {}
        _check_room(folder, sum(plan.size for plan in plans))
        for plan in plans:
            if plan.path in self._files:
                raise ValueError(f"two files are called {plan.path!r}")
            self._files[plan.path] = FileWriter(plan, folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, file: str, tensor: str, offset: int, buffer: ReadableBuffer) -> None:
        """Write all of ``buffer`` to a tensor of a file, from byte ``offset`` of it on.

        Raises:
            ValueError, OutputError: as ``FileWriter.write``; or there is no such file.
        """
        writer = self._files.get(file)
        if writer is None:
            raise ValueError(f"no file of this output is called {file!r}")
        writer.write(tensor, offset, buffer)
        if writer.complete:
            writer.finish()

    def finish(self) -> None:
        """Make sure that every byte of every file was written, and is on the disk.

        Raises:
            ValueError, OutputError: as ``FileWriter.finish``.
        """
        for writer in self._files.values():
            writer.finish()

    def close(self) -> None:
        """Close what is open, finished or not."""
        for writer in self._files.values():
            writer.close()


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
