"""Numbers as the report writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from quantrecipe.schema.schemes import GgmlRecords, Nf4, PlainWeight, ScaledWeight

MINUS: Final = "\N{MINUS SIGN}"
_BYTES: Final = ("B", "KB", "MB", "GB", "TB", "PB")


def size(count: float) -> str:
    """Bytes in decimal units with three significant digits: ``512 B``, ``9.29 GB``."""
    value, unit = float(count), 0
    while abs(value) >= 999.5 and unit < len(_BYTES) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {_BYTES[unit]}"


def decibels(value: float | None) -> str:
    """An SQNR; ``None`` and infinity are without any error."""
    return "exact" if value is None or math.isinf(value) else f"{value:.1f}"


def figure(value: float) -> str:
    """A number of no known kind, with about four significant digits and a true minus."""
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"
    return text.replace("-", MINUS)


def signed(value: float) -> str:
    """A difference: always with its sign."""
    return figure(value) if value <= 0 else f"+{figure(value)}"


def count(number: int, noun: str) -> str:
    """``1 module``, ``422 modules``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(words: Sequence[str], most: int = 6) -> str:
    """``a, b and 3 more``."""
    shown = ", ".join(words[:most])
    return f"{shown} and {len(words) - most:,} more" if len(words) > most else shown


def stored_as(weight: PlainWeight | ScaledWeight) -> str:
    """A weight format in a few words: ``int8 per channel``, ``int4 per group of 64``."""
    if not isinstance(weight, ScaledWeight) or isinstance(weight, GgmlRecords):
        return weight.format
    if isinstance(weight, Nf4):
        return f"nf4 in blocks of {weight.block_size}"
    group = getattr(weight, "group_size", None)
    block = getattr(weight, "block_size", None)
    if group is not None:
        return f"{weight.format} per group of {group}"
    if isinstance(block, tuple):
        return f"{weight.format} per block of {block[0]}x{block[1]}"
    return f"{weight.format} per {weight.granularity}"


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters; what is left out is in its middle."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
