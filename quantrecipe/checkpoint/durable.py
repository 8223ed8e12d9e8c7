"""Making files and folders last: reserving room, and pushing bytes to the disk."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Final

from quantrecipe.schema.problems import OutputError

_FULL: Final = (
    frozenset({errno.ENOSPC, errno.EDQUOT})
    if hasattr(errno, "EDQUOT")
    else frozenset({errno.ENOSPC})
)
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


def output_error(path: Path, error: OSError, needed: int | None = None) -> OutputError:
    """What to tell somebody whose output could not be written.

    Args:
        path: the file or folder.
        error: what the system said.
        needed: bytes that the file takes, where that is known.
    """
    if error.errno in _FULL:
        need = f"{path.name} needs {needed:,} bytes there" if needed is not None else ""
        return OutputError(
            f"{path.parent}: the disk is full{': ' if need else ''}{need}\n"
            "  Make room, or choose another folder."
        )
    return OutputError(f"{path}: cannot be written: {error.strerror or error}")


def reserve(descriptor: int, size: int) -> None:
    """Give an open file its final size, with room on the disk where the system can promise it.

    Raises:
        OSError: there is no room.
    """
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.ftruncate(descriptor, size)


def sync_descriptor(descriptor: int) -> None:
    """Push an open file to the disk itself, past its cache where the system has a call for that."""
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.fsync(descriptor)


def sync_data(descriptor: int) -> None:
    """Push what was written to an open file to the disk; not its times, where that is cheaper."""
    if sys.platform != "darwin" and hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        sync_descriptor(descriptor)


def sync_file(path: Path) -> None:
    """Push a file to the disk.

    Raises:
        OSError: it could not be.
    """
    with path.open("rb+", buffering=0) as file:
        sync_descriptor(file.fileno())


def sync_folder(path: Path) -> None:
    """Push the names in a folder to the disk; nothing happens where folders cannot be opened.

    Raises:
        OSError: it could not be.
    """
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
