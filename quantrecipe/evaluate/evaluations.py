"""What ``quantrecipe evaluate`` found, read again."""

from __future__ import annotations

from pathlib import Path

from quantrecipe.checkpoint import file_sha256
from quantrecipe.schema.evaluated import Evaluated
from quantrecipe.schema.validation import load_evaluation


def read_evaluation(path: Path) -> tuple[Evaluated, str]:
    """Read an evaluation by its schema.

    Returns:
        What it says, and the SHA-256 of the file.

    Raises:
        InvalidInput: it is none, or claims what it has not tested; every problem is in it.
        SourceError: the system could not read it.
    """
    return load_evaluation(path), file_sha256(path)
