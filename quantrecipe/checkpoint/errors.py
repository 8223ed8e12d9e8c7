"""What can go wrong with files beyond their contents."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import InvalidInput, OutputError, Problem, QuantrecipeError

_NAMED = 8


class SourceError(QuantrecipeError):
    """A source could not be read: no permission, a failing disk or network drive."""

    def __init__(self, path: Location, error: OSError, tensor: str | None = None) -> None:
        self.path = path
        self.tensor = tensor
        place = f"{path} [{tensor}]" if tensor else str(path)
        super().__init__(f"{place}: cannot be read: {error.strerror or error}")


def source_changed(path: Location, message: str, tensor: str | None = None) -> InvalidInput:
    """A source is no longer what was planned from; kind ``source-changed``."""
    return InvalidInput(
        Problem(
            kind="source-changed",
            message=message,
            hint="Leave the source alone while it is converted, and start again.",
            file=str(path),
            tensor=tensor,
        )
    )


class OutputExists(OutputError):  # noqa: N818 - reads as what it says
    """Files of the same names are there already, and replacing them was not asked for.

    Attributes:
        paths: the files in the way, below the output folder.
    """

    def __init__(self, out: Path, paths: Iterable[str]) -> None:
        self.out = out
        self.paths = tuple(paths)
        super().__init__(
            f"{out}: already holds {some(self.paths)}\n"
            "  Give --force to replace these files, or choose another folder."
        )


def some(names: Iterable[str], limit: int = _NAMED) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    text = ", ".join(every[:limit])
    more = len(every) - limit
    return f"{text} and {more} more" if more > 0 else text
