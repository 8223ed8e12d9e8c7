"""Tensors as headers describe them: no data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantrecipe.schema.dtypes import byte_size
from quantrecipe.schema.location import Location


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a source file.

    Attributes:
        name: as the file calls it.
        dtype: the recipe name of its dtype (``DTYPES``, in GGUF also ``BLOCK_DTYPES``).
        shape: its dimensions, row-major.
        file: the file it lies in.
        offset: of its first byte, from the start of the file.
        nbytes: its size in bytes.
        content: its bytes, if it is one of the small ones that hold JSON and say how their module
            is stored.
        pieces: what it consists of, one after the other, where it does not lie in one place; then
            ``file`` and ``offset`` are those of the first.
        times: how often what lies at ``offset`` is repeated; ``nbytes`` is the size of all.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Location
    offset: int
    nbytes: int
    content: bytes | None = field(default=None, repr=False)
    pieces: tuple[TensorInfo, ...] = ()
    times: int = 1

    def at_row(self, row: int) -> tuple[TensorInfo, int]:
        """The tensor of a file that a row lies in, and which row of that it is."""
        if sum(piece.shape[0] for piece in self.pieces) != (self.shape or (0,))[0]:
            return self, row
        for piece in self.pieces:
            if row < piece.shape[0]:
                return piece, row
            row -= piece.shape[0]
        return self, row


@dataclass(frozen=True, slots=True)
class SourceFileInfo:
    """A safetensors or GGUF file of a source: what its header says, and how to know it again.

    Attributes:
        path: where it is.
        relative: its path below the source's root, with ``/``.
        size: in bytes.
        mtime_ns: its modification time; 0 where files do not change.
        header_sha256: digest of all that is before the first tensor.
        metadata: the header's ``__metadata__``; of a GGUF file, its values as text
            (``gguf_values``).
        tensors: by name, in offset order.
    """

    path: Location
    relative: str
    size: int
    mtime_ns: int
    header_sha256: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class SourcePart:
    """One part of a source: its files, and its tensors over all of them.

    Attributes:
        name: the part's name in the recipe.
        root: the folder its sidecar files lie in.
        files: in order of their relative paths.
        tensors: by name; no name twice.
    """

    name: str
    root: Location
    files: tuple[SourceFileInfo, ...]
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written, before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return byte_size(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class OutputFilePlan:
    """A file to be written, down to every offset.

    Attributes:
        path: below the output folder, with ``/``.
        header: the length field and the JSON header, padded: the first bytes of the file.
        size: of the whole file, in bytes.
        tensors: by name, in file order.
        offsets: of each tensor's first byte, from the start of the file.
    """

    path: str
    header: bytes
    size: int
    tensors: Mapping[str, OutputTensor]
    offsets: Mapping[str, int] = field(repr=False)
