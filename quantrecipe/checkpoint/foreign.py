"""Recognising what a file is when it is not safetensors, to say so by name."""

from __future__ import annotations

from typing import Final

ONLY_SAFETENSORS: Final = (
    "Only safetensors and GGUF are read: nothing is ever unpickled, and no other container is "
    "opened."
)
_CONVERT: Final = f"{ONLY_SAFETENSORS} Save it as safetensors with the library that wrote it."
_AGAIN: Final = "The download went wrong: fetch the file again."

_MAGIC: Final[tuple[tuple[bytes, str, str], ...]] = (
    (
        b"version https://git-lfs",
        "a git-LFS pointer, not the file it stands for",
        "Run `git lfs pull` in the folder of the checkpoint.",
    ),
    (b"PK\x03\x04", "a zip archive, probably a pickled torch checkpoint", _CONVERT),
    (b"\x80\x02", "a Python pickle, probably a torch checkpoint", _CONVERT),
    (b"\x80\x03", "a Python pickle", _CONVERT),
    (b"\x80\x04", "a Python pickle", _CONVERT),
    (b"\x80\x05", "a Python pickle", _CONVERT),
    (b"\x89HDF\r\n", "an HDF5 file", _CONVERT),
    (b"\x93NUMPY", "a NumPy array file", _CONVERT),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (b"<!DOCTYPE", "an HTML page", _AGAIN),
    (b"<!doctype", "an HTML page", _AGAIN),
    (b"<html", "an HTML page", _AGAIN),
    (b"{", "a JSON text", "Name the .safetensors file itself, or its folder."),
)


def recognise(start: bytes) -> tuple[str, str] | None:
    """What a file that begins with ``start`` is, and what to do about it.

    To be asked only of files that failed as safetensors: a length field can begin with the same
    bytes as any of these.
    """
    for magic, what, hint in _MAGIC:
        if start.startswith(magic):
            return what, hint
    return None
