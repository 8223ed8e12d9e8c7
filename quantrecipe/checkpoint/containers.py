"""Headers of files of weights, whatever container they are in."""

from __future__ import annotations

from quantrecipe.checkpoint.gguf import read_open_gguf_header
from quantrecipe.checkpoint.header import read_open_header
from quantrecipe.checkpoint.opening import read_exactly, regular_file
from quantrecipe.schema.gguf import MAGIC
from quantrecipe.schema.location import Location
from quantrecipe.schema.tensors import SourceFileInfo


def read_any_header(path: Location, relative: str | None = None) -> SourceFileInfo:
    """Read what a safetensors or a GGUF file says about itself; no tensor is touched.

    See ``read_any_header_bytes``.
    """
    return read_any_header_bytes(path, relative)[0]


def read_any_header_bytes(
    path: Location, relative: str | None = None
) -> tuple[SourceFileInfo, bytearray]:
    """Read what a safetensors or a GGUF file says about itself, and the bytes that say so.

    A safetensors file that begins like a GGUF file would have a header of more than a gigabyte,
    which none is allowed to have.

    Args:
        path: the file; a symlink to one is fine.
        relative: its path below the source's root, with ``/``; the file's name if left out.

    Returns:
        The header; and all that is before the first tensor.

    Raises:
        InvalidInput: it is missing, of no such container, or malformed.
        SourceError: it is there and cannot be read.
    """
    with regular_file(path, "Name a .safetensors or a .gguf file.") as file:
        magic = bytes(read_exactly(file, len(MAGIC)))
        file.seek(0)
        read = read_open_gguf_header if magic == MAGIC else read_open_header
        return read(file, path, relative if relative is not None else path.name)
