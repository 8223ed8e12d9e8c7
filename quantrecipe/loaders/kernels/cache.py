"""Where compiled kernels and tuned configurations are kept between runs."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """``$QUANTRECIPE_CACHE``, else ``quantrecipe`` in the user's cache folder."""
    chosen = os.environ.get("QUANTRECIPE_CACHE")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "quantrecipe"


def keep(path: Path, content: bytes) -> None:
    """Write a file of the cache: whole, or not at all where the folder cannot be written."""
    with suppress(OSError):  # a cache is a convenience
        write_whole(path, content)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole, in place of the one that was there.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    made = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        made.replace(path)
    except OSError:
        made.unlink()
        raise
