"""Templates of published programs: ordinary modules with one block of data that is filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

Value = str | int | range | None | tuple["Value", ...] | Mapping["Value", "Value"]
"""What the block consists of. Strings are written in ASCII with everything else escaped, so that no
name can end a string, a line or the block, or look like another."""

_WIDTH: Final = 100


def filled(template: str, block: str, values: Mapping[str, Value]) -> str:
    """A template with other values in its block.

    Args:
        template: its text, in which the block lies between the lines ``# <block>`` and
            ``# </block>``.
        block: what the block is called.
        values: what it shall assign, by name; a name may have its annotation with it.
    """
    head, begin, rest = template.partition(f"# <{block}>\n")
    _, end, tail = rest.partition(f"# </{block}>\n")
    assert begin
    assert end
    lines = (f"{name} = {render(value, used=len(name) + 3)}\n" for name, value in values.items())
    return head + "".join(lines) + tail


def render(value: Value, indent: int = 0, used: int = 0) -> str:
    """A value as Python source, on one line where it fits."""
    line = _on_one_line(value)
    if indent + used + len(line) < _WIDTH or not isinstance(value, tuple | Mapping) or not value:
        return line
    inner = indent + 4
    pad = " " * inner
    if isinstance(value, Mapping):
        items = []
        for key, each in value.items():
            start = f"{_on_one_line(key)}: "
            items.append(f"{pad}{start}{render(each, inner, len(start) + 1)},\n")
        return "{\n" + "".join(items) + " " * indent + "}"
    items = [f"{pad}{render(each, inner, 1)},\n" for each in value]
    return "(\n" + "".join(items) + " " * indent + ")"


def _on_one_line(value: Value) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_on_one_line, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        items = (f"{_on_one_line(key)}: {_on_one_line(each)}" for key, each in value.items())
        return f"{{{', '.join(items)}}}"
    return ascii(value)
