"""Reading and judging the header of a GGUF file.

``schema.gguf`` says what a file is. A header has no length: it is read as far as it goes, within
the limits of ``gguf_scan``. Files of the versions 2 and 3 are read, little-endian. Tensors lie
without an overlap, and with no more between them than their alignment asks for: llama.cpp reads no
others.
"""

from __future__ import annotations

import hashlib
from io import RawIOBase
from typing import Final

from quantrecipe.checkpoint.entries import check_coverage
from quantrecipe.checkpoint.gguf_entries import DAMAGED, ENOUGH, read_entries
from quantrecipe.checkpoint.gguf_scan import Cursor, Values
from quantrecipe.checkpoint.opening import limited, refuse, regular_file, size_and_time
from quantrecipe.checkpoint.scan import ScanError
from quantrecipe.schema.gguf import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, VERSIONS, aligned
from quantrecipe.schema.gguf_values import LENGTH_BYTES, value_text
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.tensors import SourceFileInfo

MAX_TENSORS: Final = 1_000_000
MAX_VALUES: Final = 100_000

_SMALLEST_VALUE: Final = LENGTH_BYTES + 4 + 1
_SMALLEST_TENSOR: Final = LENGTH_BYTES + 4 + 4 + 8
_LONGEST_KEY: Final = 65_535
_LARGEST_ALIGNMENT: Final = 1 << 24


def read_gguf_header(path: Location, relative: str | None = None) -> SourceFileInfo:
    """Read what a GGUF file says about itself; none of its tensors is touched.

    See ``read_gguf_header_bytes``.
    """
    return read_gguf_header_bytes(path, relative)[0]


def read_gguf_header_bytes(
    path: Location, relative: str | None = None
) -> tuple[SourceFileInfo, bytearray]:
    """Read what a GGUF file says about itself, and the bytes that say so.

    Args:
        path: the file; a symlink to one is fine.
        relative: its path below the source's root, with ``/``; the file's name if left out.

    Returns:
        Sizes and offsets in bytes, offsets from the start of the file, shapes row-major (the
        file's own order reversed), tensors in offset order, metadata as texts of
        ``schema.gguf_values``; and all that is before the first tensor, padding included.

    Raises:
        InvalidInput: it is missing, no GGUF file, or a malformed one, with every problem found (at
            most 20, then a count); or it holds a type that is not read.
        SourceError: it is there and cannot be read.
    """
    with regular_file(path, "Name a .gguf file.") as file:
        return read_open_gguf_header(file, path, relative if relative is not None else path.name)


def read_open_gguf_header(
    file: RawIOBase, path: Location, relative: str
) -> tuple[SourceFileInfo, bytearray]:
    """As ``read_gguf_header_bytes``, of a file that is open, at its beginning."""
    size, mtime_ns = size_and_time(file)
    problems: list[Problem] = []
    cursor = Cursor(file, size)
    try:
        count, values = _start(cursor, path)
        metadata, alignment = _read_metadata(cursor, values, path, problems)
        entries = read_entries(cursor, count, path, problems)
        header = cursor.up_to(aligned(cursor.position, alignment))
    except ScanError as error:
        # What follows a break cannot be told apart from what belongs to it.
        message = f"at byte {error.position:,}: {error}"
        problems.append(Problem(error.kind, message, DAMAGED, file=str(path)))
        raise InvalidInput(limited(problems, path)) from None
    entries.sort(key=lambda entry: (entry.begin, entry.end, entry.name))
    if not problems:
        payload = max(size - aligned(cursor.position, alignment), 0)
        problems = check_coverage(entries, payload, path, alignment=alignment, hint=DAMAGED)
    if problems:
        raise InvalidInput(limited(problems, path))
    tensors = {entry.name: entry.tensor(path, len(header)) for entry in entries}
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


def _start(cursor: Cursor, path: Location) -> tuple[int, int]:
    """The numbers of tensors and of metadata values."""
    magic = cursor.take(min(len(MAGIC), cursor.size), "the magic")
    if magic != MAGIC:
        kind = "not-gguf" if magic else "empty-file"
        raise refuse(path, kind, "is empty" if not magic else "does not begin with GGUF", DAMAGED)
    version = cursor.unsigned(4, "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = f"version {version}"
        if swapped < version:
            what = f"version {swapped}, big-endian"
        raise refuse(
            path,
            "unsupported-version",
            f"is a GGUF file of {what}; versions {VERSIONS[0]} and {VERSIONS[1]}, little-endian, "
            "are read",
            "Convert it with a program that reads it.",
        )
    tensors = cursor.unsigned(LENGTH_BYTES, "the number of tensors")
    values = cursor.unsigned(LENGTH_BYTES, "the number of metadata values")
    for count, most, what in (
        (tensors, MAX_TENSORS, "tensors"),
        (values, MAX_VALUES, "metadata values"),
    ):
        if count > most:
            raise ScanError(
                "header-too-large", f"claims {count:,} {what}; up to {most:,} are read", 8
            )
    smallest = tensors * _SMALLEST_TENSOR + values * _SMALLEST_VALUE
    cursor.fits(smallest, f"claims {tensors:,} tensors and {values:,} metadata values")
    return tensors, values


def _read_metadata(
    cursor: Cursor, count: int, path: Location, problems: list[Problem]
) -> tuple[dict[str, str], int]:
    """The metadata as texts, and the alignment that it says."""
    metadata: dict[str, str] = {}
    reader = Values(cursor)
    alignment = DEFAULT_ALIGNMENT
    for _ in range(count):
        key = cursor.string("a metadata key", _LONGEST_KEY)
        start = cursor.position
        try:
            text = reader.value()
        except ScanError as error:
            raise ScanError(error.kind, f"metadata {key!r}: {error}", error.position) from None
        if key in metadata and len(problems) < ENOUGH:
            problems.append(
                Problem("duplicate-key", f"the metadata names {key!r} twice", file=str(path))
            )
        metadata[key] = text
        if key == ALIGNMENT_KEY:
            alignment = _alignment(text, start)
    return metadata, alignment


def _alignment(text: str, position: int) -> int:
    given = text.removeprefix(value_text("uint32", ""))
    alignment = int(given) if given != text else 0
    if not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise ScanError(
            "bad-alignment", f"{ALIGNMENT_KEY} is {text!r}: no uint32 power of two", position
        )
    return alignment
