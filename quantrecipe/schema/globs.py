"""The glob half of module patterns: from the grammar to an RE2 expression of about its length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

MAX_EXPANSION: Final = 10_000
"""Alternatives that the braces of one pattern may stand for, multiplied out."""

MAX_DEPTH: Final = 16
"""Braces inside braces."""

MAX_DIGITS: Final = 9
"""Digits of a number in a range."""

_DEEP = "**"
# Wildcards and operators of other glob and regex languages: a module is hardly ever called so, and
# a pattern that silently matches nothing is worse than one that is refused.
_FOREIGN = frozenset("?[]()|^$+\\")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)(?=[,}]|\Z)")


class PatternError(ValueError):
    """Why a text is not a pattern; ``position`` is the 0-based character where that shows."""

    def __init__(self, message: str, position: int | None = None) -> None:
        place = "" if position is None else f" (at character {position + 1})"
        super().__init__(message + place)


def glob_to_regex(text: str) -> str:
    """The RE2 expression whose full matches are the names that the glob ``text`` matches.

    Raises:
        PatternError: ``text`` is no glob, or its braces stand for more than ``MAX_EXPANSION``.
    """
    segments, count = _Parser(text).sequence(0)
    if count > MAX_EXPANSION:
        raise PatternError(
            f"its braces stand for more than {MAX_EXPANSION:,} alternatives; use '*' or 're:'"
        )
    return _join(segments)


class _Parser:
    """A recursive-descent parser; ``at`` is the next character to look at."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def sequence(self, depth: int) -> tuple[list[str], int]:
        """Segments up to the end of the text or of the alternative, and how many names they say."""
        segments, count, start = [""], 1, self.at
        while not self.ends_sequence(depth):
            character = self.text[self.at]
            if character == ".":
                self.refuse_empty(start, depth)
                segments.append("")
                self.at += 1
                start = self.at
            elif character == "*":
                segments[-1] += self.stars(start, depth)
            elif character == "{":
                regex, alternatives = self.braces(depth + 1)
                segments[-1] += regex
                count *= alternatives
            else:
                segments[-1] += self.literal(character)
        self.refuse_empty(start, depth)
        return segments, count

    def ends_sequence(self, depth: int) -> bool:
        return self.at == len(self.text) or (depth > 0 and self.text[self.at] in ",}")

    def refuse_empty(self, start: int, depth: int) -> None:
        if self.at > start:
            return
        if self.text[max(start - 1, 0) : start + 1] == "..":
            raise PatternError("a range is two whole numbers in braces, as in '{0..33}'", start - 1)
        if depth > 0 and self.text[start - 1] in "{,":
            raise PatternError("an alternative is empty or begins with a dot", start)
        raise PatternError("a dotted segment is empty", start)

    def stars(self, start: int, depth: int) -> str:
        begin = self.at
        while self.text[self.at : self.at + 1] == "*":
            self.at += 1
        if self.at - begin == 1:
            return "[^.]*"
        if depth > 0:
            raise PatternError("'**' cannot stand in braces; write one pattern for each", begin)
        alone = begin == start and self.text[self.at : self.at + 1] in ("", ".")
        if self.at - begin > 2 or not alone:
            raise PatternError("'**' stands for whole segments: only dots may be beside it", begin)
        return _DEEP

    def braces(self, depth: int) -> tuple[str, int]:
        """``{...}`` as an expression, and how many alternatives it stands for."""
        begin = self.at
        if depth > MAX_DEPTH:
            raise PatternError(f"braces nest deeper than {MAX_DEPTH}", begin)
        items: list[str] = []
        total = 0
        ranged = False
        while self.text[self.at : self.at + 1] in ("{", ","):
            self.at += 1
            number_range = self.number_range()
            ranged |= number_range is not None
            regex, count = number_range or self.alternative(depth)
            items.append(regex)
            total += count
            if self.at == len(self.text):
                raise PatternError("a brace is never closed", begin)
            if self.text[self.at] == "}":
                break
        self.at += 1
        if len(items) == 1 and not ranged:
            raise PatternError("braces hold alternatives '{a,b}' or a range '{0..33}'", begin)
        return f"(?:{'|'.join(items)})", total

    def alternative(self, depth: int) -> tuple[str, int]:
        segments, count = self.sequence(depth)
        return r"\.".join(segments), count

    def number_range(self) -> tuple[str, int] | None:
        found = _RANGE.match(self.text, self.at)
        if found is None:
            return None
        for group in (1, 2):
            if found[group] != "0" and found[group].startswith("0"):
                raise PatternError("a number in a range has a leading zero", found.start(group))
            if len(found[group]) > MAX_DIGITS:
                raise PatternError(
                    f"a number has more than {MAX_DIGITS} digits", found.start(group)
                )
        low, high = int(found[1]), int(found[2])
        if low > high:
            raise PatternError(f"the range runs backwards; write '{{{high}..{low}}}'", self.at)
        if high - low >= MAX_EXPANSION:
            raise PatternError(f"the range holds more than {MAX_EXPANSION:,} numbers", self.at)
        self.at = found.end()
        return _numbers(low, high), high - low + 1

    def literal(self, character: str) -> str:
        if character in _FOREIGN:
            raise PatternError(
                f"{character!r} has no meaning in a glob; write 're:' and an expression", self.at
            )
        if character == "}":
            raise PatternError("a brace is closed that was never opened", self.at)
        if character == ",":
            raise PatternError("alternatives go into braces, as in '{a,b}'", self.at)
        if not character.isprintable() or character.isspace():
            raise PatternError(f"{character!r} is no character of a module name", self.at)
        self.at += 1
        return re.escape(character)


def _join(segments: Sequence[str]) -> str:
    """Segments with their dots; ``**`` takes the dot on one side of it along, or both ends."""
    merged = [s for i, s in enumerate(segments) if s != _DEEP or i == 0 or segments[i - 1] != _DEEP]
    text, dot = "", ""
    for index, segment in enumerate(merged):
        if segment != _DEEP:
            text, dot = text + dot + segment, r"\."
        elif index < len(merged) - 1:
            text, dot = text + dot + r"(?:(?s:.*)\.)?", ""
        else:
            text += r"(?:\.(?s:.*))?" if dot else "(?s:.*)"
    return text


def _numbers(low: int, high: int) -> str:
    """An expression for ``low`` to ``high``: its size grows with their digits, not their number."""
    pieces = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        least = max(low, 10 ** (digits - 1) if digits > 1 else 0)
        pieces.append(_same_length(str(least), str(min(high, 10**digits - 1))))
    return f"(?:{'|'.join(pieces)})"


def _same_length(low: str, high: str) -> str:
    if low == high:
        return low
    if len(low) == 1:
        return f"[{low}-{high}]"
    if low[0] == high[0]:
        return low[0] + _same_length(low[1:], high[1:])
    rest = len(low) - 1
    if not int(low) and int(high) == 10 ** len(high) - 1:  # keeps both splits below one-sided
        return "[0-9]" * len(low)
    pieces = [
        low[0] + _same_length(low[1:], "9" * rest),
        high[0] + _same_length("0" * rest, high[1:]),
    ]
    if int(high[0]) - int(low[0]) > 1:
        pieces.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}]" + "[0-9]" * rest)
    return f"(?:{'|'.join(pieces)})"
