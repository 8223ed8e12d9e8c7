"""Many names as few patterns: numbers that run on are written as ranges."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from quantrecipe.schema.patterns import REGEX_PREFIX, check_pattern

_DIGITS: Final = re.compile(r"([0-9]+)")
_SPECIAL: Final = re.compile(r"([^A-Za-z0-9_./ -])")


@dataclass(frozen=True, slots=True)
class NameGroup:
    """Names that one pattern stands for.

    Attributes:
        pattern: a module pattern that matches exactly ``names``.
        names: sorted, numbers by value.
    """

    pattern: str
    names: tuple[str, ...]


def skeleton(name: str) -> str:
    """The name with ``#`` for each run of digits; equal skeletons differ in numbers only."""
    return _DIGITS.sub("#", name)


def starred(name: str) -> str:
    """The name with ``*`` for each segment that is a number."""
    return ".".join("*" if segment.isdecimal() else segment for segment in name.split("."))


def collapse(names: Iterable[str]) -> tuple[NameGroup, ...]:
    """The names as disjoint patterns, ``layers.{0..33}.attention.qkv`` for 34 of them.

    Every name is matched by exactly one of the patterns, and no pattern matches anything else, so a
    rule made of them takes these modules only, whatever else there is.
    """
    families: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for name in sorted(set(names), key=natural):
        pieces = _DIGITS.split(name)
        families.setdefault(tuple(pieces[0::2]), []).append(tuple(pieces[1::2]))
    groups: list[NameGroup] = []
    for texts, numbers in families.items():
        for choices in _boxes(numbers):
            groups += _groups(texts, choices)
    return tuple(sorted(groups, key=lambda group: natural(group.names[0])))


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A sort key by which ``layers.2`` comes before ``layers.10``."""
    return tuple((int(piece), "") if piece.isdecimal() else (-1, piece) for piece in _split(name))


def _split(name: str) -> list[str]:
    # int() refuses numbers of thousands of digits.
    return [piece[:4000] for piece in _DIGITS.split(name) if piece]


Choices = tuple[tuple[str, ...], ...]
"""For each place of a number the numbers that may stand there, in all combinations."""


def _boxes(rows: Sequence[tuple[str, ...]]) -> Iterator[Choices]:
    """The rows as a disjoint union of products."""
    if not rows[0]:
        yield ()
        return
    tails: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        tails.setdefault(row[0], []).append(row[1:])
    heads: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for head, rest in tails.items():
        heads.setdefault(tuple(rest), []).append(head)
    for same, numbers in heads.items():
        for inner in _boxes(same):
            yield (tuple(numbers), *inner)


def _groups(texts: tuple[str, ...], choices: Choices) -> Iterator[NameGroup]:
    """The product as one pattern, or cut up where it would be too large for one."""
    pattern = _weave(texts, [_braces(numbers) for numbers in choices])
    if _is_literal(texts) and check_pattern(pattern) is None:
        names = [_weave(texts, numbers) for numbers in product(*choices)]
        yield NameGroup(pattern, tuple(sorted(names, key=natural)))
        return
    widest = max(range(len(choices)), key=lambda place: len(choices[place]), default=0)
    if not choices or len(choices[widest]) == 1:
        name = _weave(texts, [numbers[0] for numbers in choices])
        yield NameGroup("re:" + _SPECIAL.sub(_escape, name).replace(".", r"\."), (name,))
        return
    half = len(choices[widest]) // 2
    for part in (choices[widest][:half], choices[widest][half:]):
        yield from _groups(texts, (*choices[:widest], part, *choices[widest + 1 :]))


def _is_literal(texts: tuple[str, ...]) -> bool:
    """Whether a pattern takes these pieces of names for nothing but themselves."""
    return not texts[0].startswith(REGEX_PREFIX) and not any(set("*{}") & set(t) for t in texts)


def _weave(texts: Sequence[str], numbers: Sequence[str]) -> str:
    filled = "".join(text + number for text, number in zip(texts, numbers, strict=False))
    return filled + texts[-1]


def _braces(numbers: Sequence[str]) -> str:
    """``{0..33}``, ``{3,9,31}``, ``{0..3,7}``; a single number stands for itself."""
    plain = sorted({int(number) for number in numbers if _counts(number)})
    items = [item for start, stop in _runs(plain) for item in _run(start, stop)]
    items += [number for number in numbers if not _counts(number)]
    if len(items) == 1 and ".." not in items[0]:
        return items[0]
    return "{" + ",".join(items) + "}"


def _counts(number: str) -> bool:
    """Whether a range could hold it: ranges know no leading zeros, and no number without end."""
    return len(number) <= 9 and (number == "0" or not number.startswith("0"))


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = previous = None
    for number in numbers:
        if start is None or previous is None:
            start = number
        elif number != previous + 1:
            yield start, previous
            start = number
        previous = number
    if start is not None and previous is not None:
        yield start, previous


def _run(start: int, stop: int) -> list[str]:
    if stop - start >= 2:
        return [f"{start}..{stop}"]
    return [str(number) for number in range(start, stop + 1)]


def _escape(found: re.Match[str]) -> str:
    return rf"\x{{{ord(found[1]):x}}}"
