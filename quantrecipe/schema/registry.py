"""What is known by name: built-in layouts and recipes, and what entry points add to them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def entry_points_by_name(group: str) -> Mapping[str, EntryPoint]:
    """The entry points of a group; the same name from two projects is an error, not a race.

    Raises:
        InvalidInput: two different entry points share a name.
    """
    # Slow to import, and not needed by who names only what is built in.
    from importlib.metadata import entry_points

    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            owners = [p.dist.name if p.dist else p.value for p in (other, point)]
            raise InvalidInput(
                Problem(
                    "duplicate-entry-point",
                    f"{owners[0]} and {owners[1]} both register {point.name!r} in {group}",
                    hint="Uninstall one of them, or ask its author for another name.",
                )
            )
    return dict(sorted(found.items()))


def _built_in(folder: str) -> dict[str, Traversable]:
    root = files("quantrecipe").joinpath(folder)
    return {
        entry.name.removesuffix(".json"): entry
        for entry in sorted(root.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".json")
    }


@cache
def _documents(folder: str, group: str) -> Mapping[str, Traversable | EntryPoint]:
    found: dict[str, Traversable | EntryPoint] = dict(_built_in(folder))
    for name, point in entry_points_by_name(group).items():
        if name in found:
            raise InvalidInput(
                Problem(
                    "duplicate-entry-point",
                    f"{point.value} registers {name!r} in {group}, which is built in",
                    hint="Ask its author for another name.",
                )
            )
        found[name] = point
    return found


def _text(name: str, found: Traversable | EntryPoint) -> str:
    """An entry point gives a JSON document as a dictionary, or the path of a JSON file."""
    if isinstance(found, Traversable):
        return found.read_text("utf-8")
    value = _load(name, found)
    try:
        return json.dumps(value) if isinstance(value, dict) else Path(value).read_text("utf-8")
    except (OSError, TypeError, ValueError) as error:
        raise _broken(name, found, error) from error


def _load(name: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise _broken(name, point, error) from error


def _broken(name: str, point: EntryPoint, error: Exception) -> InvalidInput:
    return InvalidInput(
        Problem(
            "broken-entry-point",
            f"{name!r} cannot be loaded from {point.value}: {error}",
            hint="Tell the author of the project that registers it in " + point.group + ".",
        )
    )


class KnownLayouts(Collection[str]):
    """The names of every known layout; installed packages are looked through only if need be."""

    def __contains__(self, name: object) -> bool:
        return name in _built_in("layouts") or name in layout_names()

    def __iter__(self) -> Iterator[str]:
        return iter(layout_names())

    def __len__(self) -> int:
        return len(layout_names())


def layout_names() -> list[str]:
    """Every known layout."""
    return sorted(_documents("layouts", "quantrecipe.layouts"))


@cache
def named_layout(name: str) -> Layout:
    """A known layout.

    Raises:
        InvalidInput: no layout is called that, or it does not hold to the schema.
    """
    known = _documents("layouts", "quantrecipe.layouts")
    if name not in known:
        raise InvalidInput(
            Problem(
                "unknown-layout",
                f"no layout is called {name!r}",
                hint=did_you_mean(name, sorted(known)),
            )
        )
    from quantrecipe.schema.validation import parse_layout

    layout = parse_layout(_text(name, known[name]), f"layout {name}")
    if layout.name != name:
        # Whoever reads the output looks the layout up by the name that it gives itself.
        raise InvalidInput(
            Problem(
                "misnamed-layout",
                f"registered as {name!r}, it calls itself {layout.name!r}",
                hint="Ask its author to register it under its own name.",
                file=f"layout {name}",
                pointer="/name",
            )
        )
    return layout


def resolve_layout(reference: str | Layout) -> Layout:
    """The layout that a recipe names or holds inline."""
    return named_layout(reference) if isinstance(reference, str) else reference


def recipe_names() -> list[str]:
    """Every known recipe."""
    return sorted(_documents("recipes", "quantrecipe.recipes"))


def recipe_text(name: str) -> str:
    """The JSON text of a known recipe.

    Raises:
        InvalidInput: no recipe is called that.
    """
    known = _documents("recipes", "quantrecipe.recipes")
    if name not in known:
        raise InvalidInput(
            Problem(
                "unknown-recipe",
                f"no built-in recipe is called {name!r}, and no such file exists",
                hint=did_you_mean(name, sorted(known)),
            )
        )
    return _text(name, known[name])


def load_named(group: str, name: str, what: str) -> Any:
    """Load one entry point of a group by name.

    Raises:
        InvalidInput: nothing of that name is registered.
    """
    points = entry_points_by_name(group)
    if name not in points:
        raise InvalidInput(
            Problem(
                f"unknown-{what}",
                f"no {what} is called {name!r}",
                hint=did_you_mean(name, sorted(points)),
            )
        )
    return _load(name, points[name])
