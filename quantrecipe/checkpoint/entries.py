"""What a header says about one tensor, and whether all of it together covers the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from quantrecipe.checkpoint.scan import ScanError, Scanner
from quantrecipe.schema.dtypes import BY_CODE, DType
from quantrecipe.schema.gguf import aligned
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import Problem, did_you_mean
from quantrecipe.schema.tensors import TensorInfo

_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})
_LARGEST: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header; ``begin`` and ``end`` in bytes after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def tensor(self, file: Location, header_bytes: int, content: bytes | None = None) -> TensorInfo:
        """What it describes, in a file whose tensors begin after so many bytes."""
        return TensorInfo(
            name=self.name,
            dtype=self.dtype,
            shape=self.shape,
            file=file,
            offset=header_bytes + self.begin,
            nbytes=self.end - self.begin,
            content=content,
        )


def read_metadata(scanner: Scanner, path: Location, problems: list[Problem]) -> dict[str, str]:
    """The ``__metadata__`` object; duplicate keys are added to ``problems``.

    Raises:
        ScanError: it is not an object of strings.
    """
    metadata: dict[str, str] = {}
    for key in scanner.members():
        if key in metadata:
            problems.append(
                Problem(
                    kind="duplicate-key",
                    message=f"__metadata__ names the key {key!r} twice",
                    file=str(path),
                )
            )
        if scanner.peek() != '"':
            raise ScanError(
                "bad-metadata", f"the value of {key!r} is not a string", scanner.position
            )
        metadata[key] = scanner.string()
    return metadata


def read_entry(
    scanner: Scanner, name: str, path: Location, problems: list[Problem]
) -> Entry | None:
    """The description of the tensor ``name``; what is wrong with it goes to ``problems``.

    Raises:
        ScanError: it is no flat JSON object, so that nothing behind it can be read.
    """
    fields = scanner.flat_object()

    def problem(kind: str, message: str, hint: str | None = None) -> None:
        problems.append(Problem(kind=kind, message=message, hint=hint, file=str(path), tensor=name))

    if fields.keys() != _FIELDS:
        missing = sorted(_FIELDS - fields.keys())
        unknown = sorted(fields.keys() - _FIELDS)
        said = [f"lacks {', '.join(missing)}"] if missing else []
        said += [f"has the unknown field {', '.join(map(repr, unknown))}"] if unknown else []
        problem("bad-tensor-entry", "its entry " + " and ".join(said))
        return None
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    dtype = BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        problem("unknown-dtype", f"unknown dtype {code!r}", did_you_mean(str(code), [*BY_CODE]))
    if not _all_sizes(shape):
        problem("bad-shape", f"the shape is not a list of sizes: {_short(shape)}")
        return None
    if not _all_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        problem("bad-offsets", f"data_offsets is not [begin, end]: {_short(offsets)}")
        return None
    if dtype is None:
        return None
    fault = _size_fault(dtype, shape, offsets[1] - offsets[0])
    if fault is not None:
        problem(*fault)
        return None
    return Entry(name, dtype.name, tuple(shape), offsets[0], offsets[1])


def check_coverage(
    entries: Sequence[Entry],
    payload: int,
    path: Location,
    *,
    alignment: int = 1,
    hint: str | None = None,
) -> list[Problem]:
    """Whether ``entries``, in offset order, fill ``payload`` bytes without hole or overlap.

    Args:
        entries: all of the file's.
        payload: how many bytes it has after its header.
        path: the file.
        alignment: each begins at a multiple of this many bytes; up to the next is no hole.
        hint: what to do about a problem.
    """
    problems: list[Problem] = []

    def problem(kind: str, message: str, tensor: str | None = None) -> None:
        problems.append(Problem(kind, message, hint, file=str(path), tensor=tensor))

    covered, previous = 0, None
    for entry in entries:
        if entry.begin % alignment:
            message = f"the offset {entry.begin:,} is no multiple of the alignment {alignment}"
            problem("bad-offsets", message, entry.name)
        elif entry.begin > aligned(covered, alignment):
            after = f"after {previous!r}" if previous is not None else "after the header"
            problem(
                "hole", f"{entry.begin - covered:,} bytes {after} belong to no tensor", entry.name
            )
        elif entry.begin < covered:
            problem(
                "overlap", f"shares {covered - entry.begin:,} bytes with {previous!r}", entry.name
            )
        if entry.end >= covered:
            covered, previous = entry.end, entry.name
    if covered > payload:
        problem(
            "truncated-file",
            f"is {covered - payload:,} bytes short of the {covered:,} that its header describes",
            previous,
        )
    elif aligned(covered, alignment) < payload:
        problem("trailing-bytes", f"{payload - covered:,} bytes at the end belong to no tensor")
    return problems


def _all_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= _LARGEST for item in value
    )


def _size_fault(dtype: DType, shape: list[int], nbytes: int) -> tuple[str, str] | None:
    # Zeros are left out so that a reader that multiplies from left to right overflows no sooner.
    bits, empty = dtype.bits, False
    for dim in shape:
        empty = empty or dim == 0
        bits *= dim or 1
        if bits > _LARGEST:
            return "bad-shape", f"the shape {_short(shape)} is too large for any file"
    bits = 0 if empty else bits
    if bits % 8:
        return (
            "unaligned-tensor",
            f"{bits // dtype.bits} elements of {dtype.bits} bits do not fill whole bytes",
        )
    if bits // 8 != nbytes:
        takes = f"{dtype.code} of shape {_short(shape)} takes {bits // 8:,} bytes"
        return "bad-offsets", f"{takes}; data_offsets span {nbytes:,}"
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
