"""``safetensors_loader.py``: a loader for one checkpoint, which needs nothing of this package.

It is the file of that name beside this one, in which the block between two marks is replaced by
what a plan or a lock says. That file is an ordinary module, checked and tested as such, and never
imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from itertools import groupby
from operator import itemgetter
from typing import Final

from quantrecipe.converter.loader_contents import Contents, Entry
from quantrecipe.converter.templates import Value, filled, render
from quantrecipe.schema.dtypes import DTYPES
from quantrecipe.schema.layout import Layout, ModuleTensors
from quantrecipe.schema.layout_reading import roles
from quantrecipe.schema.layout_writing import storage_of
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.schemes import (
    AnyWeight,
    Float8Block,
    Int8Group,
    PlainWeight,
)

LOADER_NAME: Final = "safetensors_loader.py"
_NUMBER: Final = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])")
"""A segment of a dotted name that is a number, written as Python would write it."""

_READABLE: Final = ("int8", "float8_e4m3fn", "float8_e5m2")


def unreadable(contents: Contents) -> Iterator[Entry]:
    """The modules that the loader has no words for."""
    for entry in contents.entries:
        weight = entry.weight
        if weight is None or isinstance(weight, PlainWeight):
            continue
        if weight.format not in _READABLE or storage_of(contents.layout, weight):
            yield entry


def loader_source(contents: Contents) -> bytes:
    """The text of a loader for a checkpoint; a pure function of what is in that.

    Raises:
        InvalidInput: there are formats that that loader does not read.
    """
    beyond = list(unreadable(contents))
    if beyond:
        assert beyond[0].weight is not None
        raise InvalidInput(
            Problem(
                "loader-cannot-read",
                "the loader beside the checkpoint reads codes of whole bytes with scales of one "
                f"level, and {len(beyond):,} modules have something else, as "
                f"{beyond[0].weight.format}",
                hint="Take 'emit_loader' out; quantrecipe.loaders reads them.",
                pointer="/target/emit_loader",
                tensor=beyond[0].name,
            )
        )
    template = files("quantrecipe.converter").joinpath(LOADER_NAME).read_text("utf-8")
    parts: dict[Value, Value] = {part: _part(contents, part) for part in contents.parts}
    values: dict[str, Value] = {"RECIPE": contents.recipe, "PARTS: dict[str, Part]": parts}
    return filled(template, "checkpoint", values).encode()


def _part(contents: Contents, part: str) -> dict[Value, Value]:
    entries = [entry for entry in contents.entries if entry.part == part]
    groups: dict[str, _Group] = {}
    for entry in entries:
        described = _described(contents.layout, entry)
        group = groups.setdefault(render(described), _Group(described))
        group.add(entry)
    return {
        "files": tuple(sorted({file for entry in entries for file in entry.files})),
        "groups": tuple(group.literal() for group in groups.values()),
    }


class _Group:
    """Modules that are stored alike, or tensors of no module."""

    def __init__(self, described: Mapping[Value, Value]) -> None:
        self._described = described
        self._names: dict[tuple[int, ...], list[str]] = {}
        self._bytes = 0

    def add(self, entry: Entry) -> None:
        shape = entry.tensors["tensor" if entry.weight is None else "weight"].shape
        self._names.setdefault(shape, []).append(entry.name)
        self._bytes += entry.nbytes

    def literal(self) -> dict[Value, Value]:
        names: dict[Value, Value] = {
            shape: tuple(with_ranges(names)) for shape, names in sorted(self._names.items())
        }
        return {**self._described, "names": names, "bytes": self._bytes}


def _described(layout: Layout, entry: Entry) -> dict[Value, Value]:
    weight = entry.weight
    if weight is None:
        return _of_other(layout, entry)
    activation = entry.activation
    tensors: dict[Value, Value] = {
        role: (
            template.replace("{part}", entry.part).replace("{module}", "{}"),
            DTYPES[entry.tensors[role].dtype].code,
            shape,
        )
        for role, template, shape in _templates(layout, weight)
        if role in entry.tensors
    }
    return {
        "format": _in_words(entry, weight),
        "block": _block(weight),
        "activation": (activation.format, activation.granularity) if activation else None,
        "rotation": entry.rotation.size if entry.rotation else None,
        "tensors": tensors,
    }


def _of_other(layout: Layout, entry: Entry) -> dict[Value, Value]:
    name = layout.others.name.replace("{part}", entry.part).replace("{tensor}", "{}")
    dtype = entry.tensors["tensor"].dtype
    return {
        "format": f"{dtype}, of no module",
        "block": None,
        "activation": None,
        "rotation": None,
        "tensors": {"tensor": (name, DTYPES[dtype].code, ())},
    }


def _templates(
    layout: Layout, weight: AnyWeight
) -> Iterator[tuple[str, str, tuple[int | str, ...]]]:
    """For each role that a module may have: the template of its name, and its shape."""
    templates: ModuleTensors | None = (
        layout.modules.plain
        if isinstance(weight, PlainWeight)
        else getattr(layout.modules, weight.format)
    )
    assert templates is not None
    yield "weight", templates.weight.name, ("out", "in")
    for role, template in roles(templates):
        if (
            role == "weight_scale"
            and templates.weight_scale
            and not isinstance(weight, PlainWeight)
        ):
            yield role, template.name, templates.weight_scale.shapes[weight.granularity][0]
        elif role == "smoothing":
            yield role, template.name, ("in",)
        elif role == "bias":
            yield role, template.name, ("out",)


def _block(weight: AnyWeight) -> Value:
    """Rows and columns that share a scale."""
    if isinstance(weight, PlainWeight):
        return None
    if isinstance(weight, Float8Block):
        return weight.block_size
    if isinstance(weight, Int8Group):
        return 1, weight.group_size
    return ("out" if weight.granularity == "tensor" else 1), "in"


def _in_words(entry: Entry, weight: AnyWeight) -> str:
    activation = entry.activation
    words = str(weight.format)
    if not isinstance(weight, PlainWeight):
        words += f" by {weight.granularity}"
    if activation is not None:
        words += f", inputs {activation.format} by {activation.granularity}"
    words += ", smoothed" if "smoothing" in entry.tensors else ""
    return words + (", rotated" if entry.rotation else "")


def with_ranges(names: Iterable[str]) -> Iterator[Value]:
    """Names, those that differ in one number only as ``(before, range, after)``.

    Together they stand for ``names``, each once.
    """
    families: dict[str | tuple[str, str], list[tuple[int, str]]] = {}
    for name in names:
        found = _NUMBER.search(name)
        if found is None:
            families[name] = []
        else:
            around = name[: found.start()], name[found.end() :]
            families.setdefault(around, []).append((int(found.group()), name))
    for family, numbered in families.items():
        if isinstance(family, str):
            yield family
            continue
        before, after = family
        numbers = enumerate(sorted(numbered))
        for _, run in groupby(numbers, lambda pair: pair[1][0] - pair[0]):
            alike = list(map(itemgetter(1), run))
            if len(alike) == 1:
                yield alike[0][1]
            else:
                yield before, range(alike[0][0], alike[-1][0] + 1), after
