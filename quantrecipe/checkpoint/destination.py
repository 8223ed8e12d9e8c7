"""What is already where an output is to go."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from quantrecipe.checkpoint.errors import OutputExists, some
from quantrecipe.schema.problems import OutputError


def resolve(out: Path) -> Path:
    """An output folder as an absolute path without symlinks, so that it can be renamed onto."""
    return Path(os.path.realpath(out))


def within(path: Path, folder: Path) -> bool:
    """Whether a path, with the symlinks on its way followed, lies below ``folder``."""
    return resolve(path.parent).is_relative_to(resolve(folder)) and path.name not in ("", "..")


def is_absent_or_empty(out: Path) -> bool:
    """Whether nothing is there, or a folder with nothing in it."""
    if not out.exists():
        return True
    return out.is_dir() and next(out.iterdir(), None) is None


def check_destination(out: Path, paths: Iterable[str], force: bool) -> None:
    """Whether an output could be published to ``out``; to be asked before any work.

    Args:
        out: the output folder; it need not exist.
        paths: the files of the output, below ``out``, with ``/``.
        force: whether files of the same names may be replaced.

    Raises:
        OutputExists: files of the same names are there, and ``force`` is not given.
        OutputError: ``out`` is no folder, cannot be one, or something in it is in the way.
    """
    real = resolve(out)
    for place in (real, *real.parents):
        if place.is_dir():
            break
        if os.path.lexists(place):
            raise OutputError(
                f"{place}: is not a folder\n  Give a folder, new or existing, for the output."
            )
    if not real.is_dir():
        return
    if not os.access(real, os.W_OK):
        raise OutputError(f"{out}: is read-only\n  Choose another folder.")
    existing = [path for path in paths if os.path.lexists(real / path)]
    blocked = [path for path in existing if (real / path).is_dir()]
    blocked += sorted({above for path in paths if (above := _file_above(real, path)) is not None})
    if blocked:
        raise OutputError(
            f"{out}: in the way of the output: {some(blocked)}\n"
            "  Move these away, or choose another folder."
        )
    if existing and not force:
        raise OutputExists(out, existing)


def _file_above(out: Path, path: str) -> str | None:
    """The first step on the way to ``path`` that is there and is no folder."""
    steps = path.split("/")[:-1]
    for count in range(1, len(steps) + 1):
        above = out.joinpath(*steps[:count])
        if os.path.lexists(above) and not above.is_dir():
            return "/".join(steps[:count])
    return None
