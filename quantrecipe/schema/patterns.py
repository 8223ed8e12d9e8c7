"""Module patterns: exact names, globs on dotted names, and ``re:`` for everything else.

The grammar, in short (``docs/patterns.md`` has it with examples):

* ``*`` is any run of characters inside one dotted segment, the empty run included;
* ``**`` stands alone between dots for any number of whole segments, none included;
* ``{a,b}`` is one of the alternatives, ``{0..33}`` one of the whole numbers without leading zeros;
  both nest, mix (``{0..3,7}``) and may hold dots, but no ``**``;
* ``re:`` is followed by an RE2 expression that has to match the whole name.

Everything compiles to RE2, so matching takes time linear in the length of the name, whatever the
pattern.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from quantrecipe.schema.globs import PatternError, glob_to_regex
from quantrecipe.schema.problems import InvalidInput, Problem

MAX_LENGTH: Final = 1024
"""Characters of a pattern."""

REGEX_PREFIX: Final = "re:"

_META = frozenset("*{}")

# RE2 budgets. A pattern alone may compile to about MEMORY / 96 instructions; a set of patterns is
# cut so that its automaton, which needs at most 200 bytes an instruction to start, always fits:
# a set that runs out of memory would report "no match" without saying so.
_PATTERN_MEMORY = 1 << 20
_SET_MEMORY = 64 << 20
_SET_INSTRUCTIONS = 100_000


def is_exact(text: str) -> bool:
    """Whether the pattern can match one name only: itself."""
    return not text.startswith(REGEX_PREFIX) and _META.isdisjoint(text)


def check_pattern(text: str) -> str | None:
    """Why ``text`` is not a pattern, with the 1-based character where that shows, or ``None``."""
    try:
        if is_exact(text):
            _to_regex(text)
        else:
            _compile_one(text)
    except PatternError as problem:
        return str(problem)
    return None


@dataclass(frozen=True, slots=True)
class Patterns:
    """Patterns in order, compiled to be asked about many names.

    Attributes:
        patterns: as given.
    """

    patterns: tuple[str, ...]
    _exact: dict[str, int] = field(repr=False, compare=False)
    _sets: tuple[tuple[Any, tuple[int, ...]], ...] = field(repr=False, compare=False)

    @classmethod
    def compile(cls, patterns: Sequence[str]) -> Patterns:
        """Compile ``patterns``; their order is the order of precedence.

        Raises:
            InvalidInput: some are not valid; one problem each, of kind ``invalid-pattern``.
        """
        problems = [
            Problem("invalid-pattern", f"{text!r} is not a module pattern: {why}")
            for text in patterns
            if (why := check_pattern(text)) is not None
        ]
        if problems:
            raise InvalidInput(problems)
        exact: dict[str, int] = {}
        wild: list[tuple[int, str]] = []
        for index, text in enumerate(patterns):
            if is_exact(text):
                exact.setdefault(text, index)
            else:
                wild.append((index, text))
        return cls(tuple(patterns), exact, tuple(_compile_sets(wild)))

    def matches(self, name: str) -> int | None:
        """The index of the first pattern that matches the whole of ``name``, or ``None``."""
        first = self._exact.get(name)
        if not self._sets:
            return first
        encoded = name.encode("utf-8", "replace")
        for compiled, indices in self._sets:
            if first is not None and first < indices[0]:
                return first
            found: list[int] = compiled.Match(encoded)
            if found:
                index = indices[min(found)]
                return index if first is None else min(index, first)
        return first


def _options(memory: int) -> Any:
    import re2  # only globs and expressions need it

    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.max_mem = memory
    return options


def _compile_one(text: str) -> tuple[str, int]:
    """The RE2 expression of a pattern, and the number of instructions it compiles to."""
    import re2

    expression = _to_regex(text)
    try:
        compiled = re2.compile(expression, _options(_PATTERN_MEMORY))
    except re2.error as error:
        raise _explain(expression, error.args[0]) from None
    except UnicodeEncodeError as error:
        place = error.start + len(REGEX_PREFIX)
        raise PatternError("it holds half of a surrogate pair", place) from None
    return expression, int(compiled.programsize)


def _compile_sets(wild: Sequence[tuple[int, str]]) -> list[tuple[Any, tuple[int, ...]]]:
    groups: list[list[tuple[int, str]]] = []
    room = 0
    for index, text in wild:
        expression, size = _compile_one(text)
        if not groups or size > room:
            groups.append([])
            room = _SET_INSTRUCTIONS
        groups[-1].append((index, expression))
        room -= size
    return [_compile_set(group) for group in groups]


def _compile_set(group: Sequence[tuple[int, str]]) -> tuple[Any, tuple[int, ...]]:
    import re2

    compiled = re2.Set.FullMatchSet(_options(_SET_MEMORY))
    for _, expression in group:
        compiled.Add(expression)
    compiled.Compile()
    return compiled, tuple(index for index, _ in group)


def _explain(expression: str, raw: bytes | str) -> PatternError:
    """RE2's message, in words that say what to do, placed where the offending fragment is."""
    message = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
    fragment = message.rpartition(": ")[2]
    found = expression.find(fragment) if fragment and fragment != expression else -1
    position = found + len(REGEX_PREFIX) if found >= 0 else None
    if re.match(r"\(\?<?[=!]", fragment):
        message = f"RE2 has no lookarounds such as {fragment!r}; list what shall match instead"
    elif re.fullmatch(r"\\[1-9]|\(\?P=.*", fragment):
        message = f"RE2 has no backreferences such as {fragment!r}; spell the repetition out"
    elif "too large" in message:
        message = "the expression is too large; use fewer or smaller repetitions"
    else:
        message = f"RE2 refuses it: {message}"
    return PatternError(message, position)


def _to_regex(text: str) -> str:
    if len(text) > MAX_LENGTH:
        raise PatternError(f"it is longer than {MAX_LENGTH:,} characters")
    if not text.startswith(REGEX_PREFIX):
        return glob_to_regex(text)
    expression = text.removeprefix(REGEX_PREFIX)
    if not expression:
        raise PatternError(f"nothing follows {REGEX_PREFIX!r}")
    return expression
