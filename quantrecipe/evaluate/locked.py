"""The lock of a converted checkpoint, read; and what of it other checks ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from quantrecipe.checkpoint import SourceError
from quantrecipe.schema.canonical import document_bytes
from quantrecipe.schema.document import Document, parse_text
from quantrecipe.schema.lock import LOCK_NAME, Lock
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.semantics import LOCK_DAMAGED
from quantrecipe.schema.structure import build
from quantrecipe.schema.validation import examine_text

AGAIN: Final = "Fetch the file again, or convert again."


@dataclass(frozen=True, slots=True)
class OpenLock:
    """A lock that was read, or why it could not be.

    Attributes:
        lock: what it says; ``None`` if it cannot be read. It may be damaged: the problems say so,
            and what else does not hold shows where.
        problems: what is wrong with it by itself.
        document: its text, so that problems found later can say where.
    """

    lock: Lock | None
    problems: tuple[Problem, ...]
    document: Document | None = None

    def locate(self, problem: Problem) -> Problem:
        """The problem with the lock's file, line and column."""
        return self.document.locate(problem) if self.document is not None else problem


def read_lock(folder: Path) -> OpenLock:
    """Read the lock of a converted checkpoint.

    Raises:
        SourceError: it is there and cannot be read.
    """
    file = folder / LOCK_NAME
    if not file.is_file():
        hint = "A folder that convert wrote has one; fetch it along with the weights."
        return OpenLock(None, (Problem("no-lock", "there is no lock", hint, file=str(file)),))
    try:
        text = file.read_bytes()
    except OSError as error:
        raise SourceError(file, error) from error
    examined = examine_text(parse_text(text, str(file)), kind="lock")
    document, lock = examined.document, examined.model
    if document is not None and {problem.kind for problem in examined.problems} == {LOCK_DAMAGED}:
        lock = build(document.value, "lock")
    if not isinstance(lock, Lock):
        return OpenLock(None, examined.problems)
    problems = examined.problems
    if not problems and text != document_bytes(lock.to_json_value()):
        problems = (rewritten(file),)
    return OpenLock(lock, problems, document)


def rewritten(file: Path) -> Problem:
    """A document that says what it should in other bytes than were written."""
    return Problem(
        "rewritten",
        "says what was written, in other bytes",
        "It was formatted, edited or damaged; fetch it again.",
        file=str(file),
    )


def is_below(path: str) -> bool:
    """Whether a path of a lock stays below the folder that the lock is in."""
    pieces = PurePosixPath(path)
    return not pieces.is_absolute() and ".." not in pieces.parts and "\\" not in path
