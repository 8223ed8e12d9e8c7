"""Reading and judging the header of a safetensors file.

A file is: the header's length (8 bytes, little-endian, unsigned); a JSON object that maps each
tensor's name to its ``dtype``, ``shape`` and ``data_offsets`` (two byte positions after the header,
the end exclusive), with an optional ``__metadata__`` of strings; then the tensors, without a hole
or an overlap. Everything that the safetensors library refuses is refused here, and on top of it
duplicate keys, unknown fields, white space before the object, and metadata that is ``null``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from io import RawIOBase
from typing import Final

from quantrecipe.checkpoint.entries import Entry, check_coverage, read_entry, read_metadata
from quantrecipe.checkpoint.foreign import ONLY_SAFETENSORS, recognise
from quantrecipe.checkpoint.opening import (
    announce,
    limited,
    read_exactly,
    refuse,
    regular_file,
    size_and_time,
)
from quantrecipe.checkpoint.scan import ScanError, Scanner
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.tensors import SourceFileInfo

MAX_HEADER_BYTES: Final = 100_000_000
LENGTH_BYTES: Final = 8
MAX_MARKER_BYTES: Final = 1024
"""The largest tensor whose content is read along with the header."""

_MOST_MARKERS: Final = 1 << 16
_MAGIC_BYTES: Final = 64


def read_header(path: Location, relative: str | None = None) -> SourceFileInfo:
    """Read what a safetensors file says about itself; none of its tensors is touched.

    See ``read_header_bytes``.
    """
    return read_header_bytes(path, relative)[0]


def read_header_bytes(
    path: Location, relative: str | None = None
) -> tuple[SourceFileInfo, bytearray]:
    """Read what a safetensors file says about itself, and the bytes that say so.

    Args:
        path: the file; a symlink to one is fine.
        relative: its path below the source's root, with ``/``; the file's name if left out.

    Returns:
        Sizes and offsets in bytes, offsets from the start of the file, tensors in offset order;
        and all that is before the first tensor, the length field included.

    Raises:
        InvalidInput: it is missing, no safetensors file, or a malformed one, with every problem
            found (at most 20, then a count).
        SourceError: it is there and cannot be read.
    """
    with regular_file(path, "Name a .safetensors file.") as file:
        return read_open_header(file, path, relative if relative is not None else path.name)


def read_open_header(
    file: RawIOBase, path: Location, relative: str
) -> tuple[SourceFileInfo, bytearray]:
    """As ``read_header_bytes``, of a file that is open, at its beginning."""
    size, mtime_ns = size_and_time(file)
    header = _header_bytes(file, path, size)
    try:
        text = header[LENGTH_BYTES:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(
            path, "header-not-json", f"the header is not UTF-8 text: {error.reason}"
        ) from None
    entries, metadata, problems = _parse(text, path)
    payload = size - len(header)
    entries.sort(key=lambda entry: (entry.begin, entry.end, entry.name))
    if not problems:
        problems = check_coverage(entries, payload, path)
    if problems:
        raise InvalidInput(limited(problems, path))
    contents = _contents(file, entries, len(header))
    tensors = {
        entry.name: entry.tensor(path, len(header), contents.get(entry.name)) for entry in entries
    }
    found = SourceFileInfo(
        path=path,
        relative=relative,
        size=size,
        mtime_ns=mtime_ns,
        header_sha256=hashlib.sha256(header).hexdigest(),
        metadata=metadata,
        tensors=tensors,
    )
    return found, header


def _contents(file: RawIOBase, entries: Iterable[Entry], payload: int) -> dict[str, bytes]:
    """Small tensors that hold a JSON object: they say how their modules are stored."""
    small = [
        entry
        for entry in entries
        if entry.dtype == "uint8"
        and len(entry.shape) == 1
        and 2 <= entry.end - entry.begin <= MAX_MARKER_BYTES
    ]
    announce(
        file, ((payload + entry.begin, payload + entry.end) for entry in small[:_MOST_MARKERS])
    )
    found: dict[str, bytes] = {}
    for entry in small:
        file.seek(payload + entry.begin)
        content = bytes(read_exactly(file, entry.end - entry.begin))
        if content.startswith(b"{"):
            found[entry.name] = content
        if len(found) == _MOST_MARKERS:
            break
    return found


def _header_bytes(file: RawIOBase, path: Location, size: int) -> bytearray:
    """The length field and the header, after the length was held against the file's size."""
    if size == 0:
        raise refuse(
            path, "empty-file", "is empty", "The download or the copy went wrong: fetch it again."
        )
    start = bytes(read_exactly(file, min(size, _MAGIC_BYTES)))
    if size < LENGTH_BYTES:
        raise _not_safetensors(
            path, start, "truncated-file", f"has {size} bytes; a length field alone has 8"
        )
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise _not_safetensors(
            path,
            start,
            "header-too-large",
            f"claims a header of {length:,} bytes; the format allows {MAX_HEADER_BYTES:,}",
        )
    if length > size - LENGTH_BYTES:
        raise _not_safetensors(
            path,
            start,
            "truncated-file",
            f"claims a header of {length:,} bytes, and has {size - LENGTH_BYTES:,} after its "
            "length field",
        )
    if start[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{" or length == 0:
        raise _not_safetensors(path, start, "header-not-json", "the header does not begin with '{'")
    file.seek(0)
    header = read_exactly(file, LENGTH_BYTES + length)
    if len(header) < LENGTH_BYTES + length:
        raise refuse(path, "truncated-file", "became shorter while it was read")
    return header


def _parse(text: str, path: Location) -> tuple[list[Entry], dict[str, str], list[Problem]]:
    entries: list[Entry] = []
    metadata: dict[str, str] = {}
    problems: list[Problem] = []
    names: set[str] = set()
    scanner = Scanner(text)
    name = None
    try:
        for name in scanner.members():
            if name in names:
                problems.append(_duplicate(path, name))
            names.add(name)
            if name == "__metadata__":
                metadata = read_metadata(scanner, path, problems)
                continue
            entry = read_entry(scanner, name, path, problems)
            if entry is not None:
                entries.append(entry)
        scanner.end()
    except ScanError as error:
        # What follows a break cannot be told apart from what belongs to it.
        problems.append(
            Problem(
                kind=error.kind,
                message=f"at character {error.position:,} of the header: {error}",
                file=str(path),
                tensor=name if error.kind == "bad-tensor-entry" else None,
            )
        )
    return entries, metadata, problems


def _duplicate(path: Location, name: str) -> Problem:
    return Problem(
        kind="duplicate-key",
        message="the header names it twice, and readers differ in which one they take",
        file=str(path),
        tensor=name,
    )


def _not_safetensors(path: Location, start: bytes, kind: str, message: str) -> InvalidInput:
    known = recognise(start)
    if known is None:
        return refuse(
            path,
            kind,
            message,
            "It is damaged, incomplete, or not a safetensors file: fetch it again. "
            + ONLY_SAFETENSORS,
        )
    what, hint = known
    return refuse(path, "not-safetensors", f"is {what}", hint)
