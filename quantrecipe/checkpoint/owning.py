"""A file that at most one process owns; the system lets go of it when that process ends."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Final, Self

_HELD: Final = frozenset({errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK})
_UNSUPPORTED: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


class Owned:
    """A file under a lock of the system, held until ``release`` or the end of the process.

    On a file system without locks nobody is kept out.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path, content: str) -> Self | None:
        """Make the file if it is not there, own it, and write ``content`` into it.

        Returns:
            ``None`` if another process owns it.

        Raises:
            OSError: the system could not.
        """
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # the last owner is just removing the folder
                continue
            if not _lock(descriptor):
                os.close(descriptor)
                return None
            if _is_at(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, content.encode())
                return cls(path, descriptor)
            os.close(descriptor)  # the last owner removed it between our opening and owning it

    def release(self) -> None:
        """Let go of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def discard(self) -> None:
        """Remove the file, and let go of it.

        Raises:
            OSError: the system could not.
        """
        if os.name != "posix":
            self.release()  # there, what is open cannot be removed
        self.path.unlink(missing_ok=True)
        self.release()


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return True
        if error.errno in _HELD:
            return False
        raise
    return True
