"""Output that appears under its final name only when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from quantrecipe.checkpoint.destination import (
    check_destination,
    is_absent_or_empty,
    resolve,
    within,
)
from quantrecipe.checkpoint.durable import output_error, sync_file, sync_folder
from quantrecipe.schema.problems import OutputError

MARKER: Final = ".quantrecipe-partial"
SUFFIX: Final = ".partial"


class Staging:
    """A folder to build an output in, beside the place where it will appear.

    ``OUT.partial`` beside ``OUT``; inside ``OUT`` where the two could not be renamed into each
    other (``OUT`` is a mount point, or its parent is read-only). However the ``with`` block is left
    before ``publish``, the folder is removed. One that a killed process left is removed at the next
    start; one of a process that may still run is refused.

    Attributes:
        out: where the output will appear, symlinks resolved.
        folder: where to write it.
    """

    def __init__(self, out: Path) -> None:
        self.out = resolve(out)
        self._inside = _must_be_inside(self.out)
        self.folder = (
            self.out / MARKER[1:] if self._inside else self.out.with_name(self.out.name + SUFFIX)
        )

    def __enter__(self) -> Self:
        try:
            if self.folder.is_symlink() or self.folder.exists():
                self._remove_abandoned()
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir()
            owner = {"host": socket.gethostname(), "pid": os.getpid()}
            (self.folder / MARKER).write_text(json.dumps(owner), encoding="utf-8")
        except OSError as error:
            raise output_error(self.folder, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.folder.is_symlink() and self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=error is not None)

    def files(self) -> list[str]:
        """What has been put here, below the folder, with ``/``, sorted."""
        found = (path for path in self.folder.rglob("*") if not path.is_dir())
        names = (path.relative_to(self.folder).as_posix() for path in found)
        return sorted(name for name in names if name != MARKER)

    def publish(
        self,
        *,
        force: bool = False,
        lock: str | None = None,
        order: Sequence[str] = (),
        stale: Iterable[str] = (),
    ) -> None:
        """Make everything appear under its final name.

        If ``OUT`` is absent or an empty folder, that is one rename. Else files are replaced one by
        one, the lock removed first and put back last, so that a folder with a lock is never half
        old and half new. Files in ``OUT`` that are not of this output are left alone.

        Args:
            force: replace files of the same names.
            lock: the path of the lock below the folder.
            order: paths that go first, in this order (weights before their index); the others
                follow in the order of their names.
            stale: with ``force``, files of an older output to remove where this one has none of the
                same name.

        Raises:
            OutputExists: there are such files, and ``force`` was not given.
            OutputError: the system could not write.
        """
        names = self.files()
        check_destination(self.out, names, force)
        first = {name: place for place, name in enumerate(order)}
        names.sort(key=lambda name: (name == lock, first.get(name, len(first)), name))
        try:
            for name in names:
                sync_file(self.folder / name)
            for folder in {(self.folder / name).parent for name in names}:
                sync_folder(folder)
            if self._movable():
                (self.folder / MARKER).unlink()
                self._rename_whole()
            else:
                self._replace_each(names, lock, [*stale] if force else [])
        except OSError as error:
            raise output_error(self.out, error) from error

    def _movable(self) -> bool:
        # The working folder of a shell must stay the folder it is.
        return (
            not self._inside
            and is_absent_or_empty(self.out)
            and not (self.out.exists() and self.out.samefile(Path.cwd()))
        )

    def _rename_whole(self) -> None:
        if self.out.exists():
            shutil.copymode(self.out, self.folder)
            if os.name != "posix":
                self.out.rmdir()
        sync_folder(self.folder)
        self.folder.replace(self.out)
        sync_folder(self.out.parent)

    def _replace_each(self, names: Sequence[str], lock: str | None, stale: Sequence[str]) -> None:
        touched = {self.out}
        if lock is not None and (self.out / lock).is_file():
            (self.out / lock).unlink()
            sync_folder((self.out / lock).parent)
        for name in [name for name in names if name != lock]:
            self._replace(name)
            touched.add((self.out / name).parent)
        for name in stale:
            path = self.out / name
            if name not in names and within(path, self.out) and path.is_file():
                path.unlink()
                touched.add(path.parent)
        for folder in touched:
            sync_folder(folder)
        if lock in names:
            self._replace(str(lock))
            sync_folder((self.out / str(lock)).parent)

    def _replace(self, name: str) -> None:
        target = self.out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).replace(target)

    def _remove_abandoned(self) -> None:
        if self.folder.is_symlink() or not (self.folder / MARKER).is_file():
            raise OutputError(
                f"{self.folder}: is needed as a working folder, and is in use for something else\n"
                "  Move it away, or choose another output folder."
            )
        if _may_run(self.folder / MARKER):
            raise OutputError(
                f"{self.folder}: another conversion into this folder may still be running\n"
                "  If none is, remove that folder."
            )
        shutil.rmtree(self.folder)


def _must_be_inside(out: Path) -> bool:
    if not out.is_dir():
        return False
    parent = out.parent
    return (
        out.is_mount()
        or out.stat().st_dev != parent.stat().st_dev
        or not os.access(parent, os.W_OK)
    )


def _may_run(marker: Path) -> bool:
    """Whether the process that wrote a marker may still be there; if in doubt, it may."""
    try:
        owner = json.loads(marker.read_text(encoding="utf-8"))
        host, pid = owner["host"], owner["pid"]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    if os.name != "posix" or host != socket.gethostname() or type(pid) is not int or pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
