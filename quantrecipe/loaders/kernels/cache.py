"""Where compiled kernels and tuned configurations are kept between runs."""

from __future__ import annotations

import os
import tempfile
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)
    except OSError:  # a cache is a convenience
        return
