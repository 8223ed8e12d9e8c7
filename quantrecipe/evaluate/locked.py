"""The lock of a converted checkpoint, read; and what of it other checks ask for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from quantrecipe.checkpoint import SourceError
from quantrecipe.schema.canonical import document_bytes
from quantrecipe.schema.document import document_of, parse_text
from quantrecipe.schema.folds import FoldSite, find_sites
from quantrecipe.schema.lock import LOCK_NAME, Lock
from quantrecipe.schema.parsed import MAX_LOCK_BYTES
from quantrecipe.schema.problems import Problem
from quantrecipe.schema.semantics import LOCK_DAMAGED
from quantrecipe.schema.structure import build
from quantrecipe.schema.validation import examine_text, validate_value

AGAIN: Final = "Fetch the file again, or convert again."


@dataclass(frozen=True, slots=True)
class OpenLock:
    """A lock that was read, or why it could not be.

    Attributes:
        lock: what it says; ``None`` if it cannot be read. It may be damaged: the problems say so,
            and what else does not hold shows where.
        problems: what is wrong with it by itself.
        file: its path.
        text: its bytes, so that problems found later can say where.
    """

    lock: Lock | None
    problems: tuple[Problem, ...]
    file: Path
    text: bytes = b""

    def located(self, problems: Iterable[Problem]) -> list[Problem]:
        """The problems with the lock's file, line and column."""
        found = list(problems)
        if not found:
            return found
        document = document_of(parse_text(self.text, str(self.file)))
        return [document.locate(problem) for problem in found]


def read_lock(folder: Path) -> OpenLock:
    """Read the lock of a converted checkpoint.

    Raises:
        SourceError: it is there and cannot be read.
    """
    file = folder / LOCK_NAME
    if not file.is_file():
        hint = "A folder that convert wrote has one; fetch it along with the weights."
        return OpenLock(None, (Problem("no-lock", "there is no lock", hint, file=str(file)),), file)
    try:
        text = file.read_bytes()
    except OSError as error:
        raise SourceError(file, error) from error
    lock = _as_written(text)
    if lock is not None:
        return OpenLock(lock, (), file, text)
    examined = examine_text(parse_text(text, str(file)), kind="lock")
    document, model, problems = examined.document, examined.model, examined.problems
    if document is not None and {problem.kind for problem in problems} == {LOCK_DAMAGED}:
        model = build(document.value, "lock")
    if not isinstance(model, Lock):
        return OpenLock(None, problems, file)
    return OpenLock(model, problems or (rewritten(file),), file, text)


def _as_written(text: bytes) -> Lock | None:
    """The lock, if its text is to the byte what ``convert`` writes, and nothing is wrong with it.

    Reading a text that may hold anything, and noting where everything in it stands, takes as long
    as hashing a gigabyte where there are thousands of tensors.
    """
    if len(text) > MAX_LOCK_BYTES:
        return None
    try:
        value = json.loads(text)
        if document_bytes(value) != text or validate_value(value, kind="lock"):
            return None
        found = build(value, "lock")
    except (ValueError, RecursionError):
        return None
    assert isinstance(found, Lock)
    return found


def locked_sites(lock: Lock) -> tuple[FoldSite, ...]:
    """Where smoothing was folded, in the order of the plan; edges that do not fit are left out."""
    if not lock.recipe.folds:
        return ()
    sites: list[FoldSite] = []
    for part in sorted(lock.recipe.source.parts):
        mine = [module for module in lock.modules if module.part == part]
        found = find_sites(
            lock.recipe.folds,
            part,
            {module.name: module.shape for module in mine},
            {other.name: other.tensor.shape for other in lock.others if other.part == part},
            {m.name for m in mine if m.smoothing is not None and m.smoothing.apply == "fold"},
        )
        sites += found.sites
    return tuple(sites)


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
