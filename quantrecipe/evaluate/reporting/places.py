"""Where modules stand in a network, from their dotted names alone.

``layers.3.attention.qkv`` is the ``attention.qkv`` of layer 3 of ``layers``. A number in a name is
an index where it counts things of one kind: its values follow one another, and something that is
called alike stands behind several of them. The 0 of ``to_out.0``, and the 0 and 2 of a sequence of
two linears and what lies between, are part of a name like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

_MOST_DIGITS: Final = 9


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module is among the layers.

    Attributes:
        stack: the layers that its layer is one of, each index written as ``*``.
        index: the number of its layer; several where stacks lie in stacks.
        kind: what it is there; ``""`` where the layer itself is the module.
    """

    stack: str
    index: tuple[int, ...]
    kind: str

    @property
    def layer(self) -> str:
        """The number of its layer, as it is shown."""
        return ".".join(map(str, self.index))

    @property
    def title(self) -> str:
        """Its kind, as it is shown."""
        return self.kind or "(itself)"


def places(names: Iterable[str]) -> dict[str, Place | None]:
    """The place of every module; ``None`` of those outside of layers."""
    split = {name: tuple(name.split(".")) for name in names}
    indexes = _indexes(split.values())
    return {name: _place(segments, indexes) for name, segments in split.items()}


def _is_number(segment: str) -> bool:
    """Whether it counts something; with a zero in front, it is a name like any other."""
    plain = segment.isascii() and segment.isdecimal() and len(segment) <= _MOST_DIGITS
    return plain and (segment == "0" or not segment.startswith("0"))


def _skeleton(segments: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("*" if _is_number(each) else each for each in segments)


def _indexes(names: Iterable[tuple[str, ...]]) -> frozenset[tuple[str, ...]]:
    """What comes before a number that is an index, that number's ``*`` included."""
    behind: dict[tuple[str, ...], dict[int, set[tuple[str, ...]]]] = {}
    for segments in names:
        skeleton = _skeleton(segments)
        for at, segment in enumerate(segments):
            if _is_number(segment):
                values = behind.setdefault(skeleton[: at + 1], {})
                values.setdefault(int(segment), set()).add(skeleton[at + 1 :])
    return frozenset(prefix for prefix, values in behind.items() if _counts(values))


def _counts(values: Mapping[int, set[tuple[str, ...]]]) -> bool:
    if len(values) < 2 or max(values) - min(values) + 1 != len(values):
        return False
    return max(Counter(rest for found in values.values() for rest in found).values()) > 1


def _place(segments: tuple[str, ...], indexes: frozenset[tuple[str, ...]]) -> Place | None:
    skeleton = _skeleton(segments)
    found = [
        at
        for at, segment in enumerate(segments)
        if _is_number(segment) and skeleton[: at + 1] in indexes
    ]
    if not found:
        return None
    last = found[-1]
    # A name may hold a star of its own.
    stack = ".".join(
        "*" if at in found else segments[at].replace("*", r"\*") for at in range(last + 1)
    )
    return Place(
        stack.removesuffix(".*"),
        tuple(int(segments[at]) for at in found),
        ".".join(segments[last + 1 :]),
    )
