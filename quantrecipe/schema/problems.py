"""What is wrong with an input: one frozen record a problem, one exception carrying all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that does not hold.

    Attributes:
        kind: machine-readable kind, kebab-case; callers branch on this, never on ``message``.
        message: what is wrong, one sentence, without the place.
        hint: what to do about it, or ``None``.
        file: the document or checkpoint file it concerns.
        line, column: 1-based position inside ``file`` when it is a text document.
        pointer: RFC 6901 JSON pointer inside the document; ``""`` is the whole document.
        tensor: the tensor or module it concerns.
    """

    kind: str
    message: str
    hint: str | None = None
    file: str | None = None
    line: int | None = None
    column: int | None = None
    pointer: str | None = None
    tensor: str | None = None

    @property
    def where(self) -> str:
        """``file:line:column (pointer) tensor``, as much of it as is known."""
        place = self.file or ""
        if place and self.line is not None:
            place += f":{self.line}" + (f":{self.column}" if self.column is not None else "")
        pieces = [place] if place else []
        if self.pointer:
            pieces.append(f"({self.pointer})" if pieces else self.pointer)
        if self.tensor:
            pieces.append(f"[{self.tensor}]")
        return " ".join(pieces)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  {self.hint}" if self.hint else text

    def as_dict(self) -> dict[str, Any]:
        """The fields that are set, for ``--json``."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Reasons:
    """Problems, each told once however many modules it concerns."""

    _tensors: dict[Problem, list[str]] = field(default_factory=dict)

    def add(self, problem: Problem, tensor: str) -> None:
        """Note that ``problem`` concerns ``tensor`` too."""
        self._tensors.setdefault(problem, []).append(tensor)

    def __iter__(self) -> Iterator[Problem]:
        for problem, tensors in self._tensors.items():
            more = f" ({len(tensors):,} modules, the first named)" if len(tensors) > 1 else ""
            yield replace(problem, message=problem.message + more, tensor=tensors[0])


class QuantrecipeError(Exception):
    """Base of every error this package raises on purpose.

    ``exit_code`` is the command line's; ``kind`` is for programs, as that of a ``Problem``.

    Errors travel between processes: all that they hold can be pickled.
    """

    exit_code = 3
    kind = "failure"

    def __reduce__(self) -> tuple[Any, ...]:
        # Without this, the class would be called with ``args``: the text that it made itself.
        return _without_init, (type(self), *self.args), self.__dict__


def _without_init(cls: type[QuantrecipeError], *args: Any) -> QuantrecipeError:
    return cls.__new__(cls, *args)


class InvalidInput(QuantrecipeError):  # noqa: N818 - reads as what it says
    """A recipe, layout, checkpoint or bound does not hold. Carries every problem found."""

    exit_code = 1

    def __init__(self, problems: Iterable[Problem] | Problem) -> None:
        self.problems: tuple[Problem, ...] = (
            (problems,) if isinstance(problems, Problem) else tuple(problems)
        )
        if not self.problems:
            raise ValueError("InvalidInput needs at least one problem")
        super().__init__("\n".join(str(problem) for problem in self.problems))


class OutputError(QuantrecipeError):
    """The output could not be written: it exists, the disk is full, a folder is read-only."""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word nearest to ``word``, if one is near enough to be a typo of it."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint: the near miss if there is one, else what would be allowed."""
    near = closest(word, known)
    if near is not None:
        return f"Did you mean {near!r}?"
    return "Known: " + ", ".join(sorted(known)) + "." if known else "None is known."
