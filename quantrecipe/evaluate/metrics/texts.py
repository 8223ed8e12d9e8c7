"""Texts held against texts: the same, or how many edits apart."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from quantrecipe.evaluate.metrics.protocol import TEXTS, Against, unusable

MOST_BYTES: Final = 1 << 20


class ExactMatch:
    """1 where a text is the reference's, white space at both ends aside; else 0."""

    name = "exact-match"
    higher_is_better = True
    suffixes = TEXTS
    against: Against = "reference"

    def score(self, output: Path, against: Path | str) -> float:
        return float(read_text(output) == read_text(Path(against)))


class NormalizedEditDistance:
    """Edits from one text to the other, over the length of the longer; see below."""

    name = "normalized-edit-distance"
    higher_is_better = False
    suffixes = TEXTS
    against: Against = "reference"

    def score(self, output: Path, against: Path | str) -> float:
        return normalized_edit_distance(read_text(output), read_text(Path(against)))


def edit_distance(one: str, other: str) -> int:
    """The fewest insertions, deletions and replacements of code points (Levenshtein 1966).

    Columns of the table of distances are bits of one whole number (Myers 1999, J. ACM 46, 395, as
    Hyyro 2003 has it for whole texts), so that Python's arithmetic goes through many at a time.
    """
    if not one:
        return len(other)
    places: dict[str, int] = {}
    for index, character in enumerate(one):
        places[character] = places.get(character, 0) | 1 << index
    every, last = (1 << len(one)) - 1, 1 << len(one) - 1
    up, down, distance = every, 0, len(one)
    for character in other:
        here = places.get(character, 0)
        same = (((here & up) + up) ^ up) | here | down
        right, left = down | ~(same | up) & every, up & same
        distance += bool(right & last) - bool(left & last)
        right, left = right << 1 | 1, left << 1
        up, down = (left | ~(same | right)) & every, right & same & every
    return distance


def normalized_edit_distance(one: str, other: str) -> float:
    """``edit_distance`` over the length of the longer text, from 0 to 1; 0 for two empty ones."""
    longest = max(len(one), len(other))
    return edit_distance(one, other) / longest if longest else 0.0


def read_text(path: Path) -> str:
    """A text of UTF-8, without white space at both ends.

    Raises:
        InvalidInput: it is none, or longer than ``MOST_BYTES``.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise unusable(path, "unreadable", f"cannot be read: {error.strerror or error}") from None
    if len(data) > MOST_BYTES:
        raise unusable(path, "too-large", f"the text has more than {MOST_BYTES:,} bytes")
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        hint = "Save it as UTF-8."
        raise unusable(path, "not-utf-8", "the file is not UTF-8 text", hint) from None
