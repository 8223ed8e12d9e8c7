"""Output that appears under its final name only when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
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
from quantrecipe.checkpoint.owning import Owned
from quantrecipe.schema.problems import OutputError

MARKER: Final = ".quantrecipe-partial"
SUFFIX: Final = ".partial"
_REPLACED: Final = "replaced.lock.json"


class Staging:
    """A folder to build an output in, beside the place where it will appear.

    ``OUT.partial`` beside ``OUT``; inside ``OUT`` where the two could not be renamed into each
    other (``OUT`` is a mount point, or its parent is read-only). One process at a time owns it; a
    second one is refused. If the ``with`` block is left before ``publish``, the folder is removed,
    unless ``keep`` was set. What is found there from before, kept or left by a killed process, is
    still there until ``clear``.

    Args:
        out: where the output will appear.
        name: what ``folder`` is called. Whoever still writes into one of another name, a worker
            that outlived its conversion, cannot spoil this one.

    Attributes:
        out: where the output will appear, symlinks resolved.
        root: the folder, for what goes along with the work and is not published.
        folder: below it, where to write the output.
        keep: whether leaving by an error leaves everything for another attempt.
    """

    def __init__(self, out: Path, name: str = "output") -> None:
        self.out = resolve(out)
        self._inside = _must_be_inside(self.out)
        self.root = (
            self.out / MARKER[1:] if self._inside else self.out.with_name(self.out.name + SUFFIX)
        )
        self.folder = self.root / name
        self.keep = False
        self._owned: Owned | None = None

    def __enter__(self) -> Self:
        try:
            if self._is_of_others():
                raise OutputError(
                    f"{self.root}: is needed as a working folder, and is in use for something "
                    "else\n  Move it away, or choose another output folder."
                )
            owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
            self._owned = Owned.take(self.root / MARKER, owner)
            if self._owned is None:
                raise OutputError(
                    f"{self.root}: another conversion into this folder is running"
                    f"{_who(self.root / MARKER)}\n"
                    "  Wait for it to end, or choose another output folder."
                )
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise output_error(self.root, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._owned is not None
        try:
            if error is None or not self.keep:
                self._remove(ignore_errors=error is not None)
        except OSError as refused:
            raise output_error(self.root, refused) from refused
        finally:
            self._owned.release()

    def clear(self) -> None:
        """Remove what an earlier attempt left.

        Raises:
            OutputError: the system could not.
        """
        try:
            for path in self.root.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name not in (MARKER, _REPLACED):
                    path.unlink()
            self.folder.mkdir()
        except OSError as error:
            raise output_error(self.root, error) from error

    def files(self) -> list[str]:
        """What has been put into ``folder``, below it, with ``/``, sorted."""
        found = (path for path in self.folder.rglob("*") if not path.is_dir())
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def replaced_lock(self, lock: str) -> Path:
        """The lock of the output that is to be replaced; an earlier attempt may have moved it."""
        moved = self.root / _REPLACED
        return moved if moved.is_file() else self.out / lock

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
        one, the lock moved away first and put in place last, so that a folder with a lock is never
        half old and half new. Files in ``OUT`` that are not of this output are left alone.

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
                self._rename_whole()
            else:
                self._replace_each(names, lock, [*stale] if force else [])
        except OSError as error:
            raise output_error(self.out, error) from error

    def _is_of_others(self) -> bool:
        if self.root.is_symlink() or (self.root.exists() and not self.root.is_dir()):
            return True
        if not self.root.exists() or (self.root / MARKER).is_file():
            return False
        return any(self.root.iterdir())

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
            (self.out / lock).replace(self.root / _REPLACED)
            sync_folder(self.root)
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

    def _remove(self, ignore_errors: bool) -> None:
        """The marker last: whoever finds a folder with it knows whose it is."""
        assert self._owned is not None
        for path in self.root.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=ignore_errors)
            elif path.name != MARKER:
                path.unlink()
        self._owned.discard()
        with suppress(OSError):
            self.root.rmdir()


def _must_be_inside(out: Path) -> bool:
    if not out.is_dir():
        return False
    parent = out.parent
    return (
        out.is_mount()
        or out.stat().st_dev != parent.stat().st_dev
        or not os.access(parent, os.W_OK)
    )


def _who(marker: Path) -> str:
    try:
        owner = json.loads(marker.read_text(encoding="utf-8"))
        return f": process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
