"""An append-only file of records, each of which holds by itself or counts for nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import xxhash

from quantrecipe.checkpoint.durable import output_error, sync_data

_DIGITS: Final = 16


def read_journal(path: Path) -> list[Any]:
    """The records of a journal, in order; none if there is no such file.

    A line that its digest does not fit was torn by a crash or damaged later. It is left out, and
    what it stood for counts as not done.

    Raises:
        OutputError: the file is there and cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise output_error(path, error) from error
    return [
        json.loads(line[_DIGITS + 1 :])
        for line in lines
        if len(line) > _DIGITS and _line(line[_DIGITS + 1 :]) == line
    ]


class Journal:
    """Writes records to a journal; an old one is gone on with.

    Args:
        path: the file.

    Raises:
        OutputError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            size = os.fstat(self._descriptor).st_size
            if size and _byte_at(self._descriptor, size - 1) != b"\n":
                os.write(self._descriptor, b"\n")  # what a crash tore stays a line of its own
        except OSError as error:
            raise output_error(path, error) from error

    def append(self, records: Iterable[Any]) -> None:
        """Add records, and push them to the disk.

        Raises:
            OutputError: the system could not write.
        """
        text = b"".join(_line(_encode(record)) + b"\n" for record in records)
        try:
            while text:
                text = text[os.write(self._descriptor, text) :]
            sync_data(self._descriptor)
        except OSError as error:
            raise output_error(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _byte_at(descriptor: int, position: int) -> bytes:
    os.lseek(descriptor, position, os.SEEK_SET)
    return os.read(descriptor, 1)


def _encode(record: Any) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


def _line(content: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(content).encode() + b" " + content
