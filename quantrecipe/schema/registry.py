"""What is known by name: built-in layouts, names and recipes, and what entry points add to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from quantrecipe.schema.layout import Layout
from quantrecipe.schema.names import NameMapping, Names
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

AnyNamed = TypeVar("AnyNamed", Layout, Names)


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


class KnownDocuments(Collection[str]):
    """The names of every known document of a kind.

    Installed packages are looked through only if need be.

    Args:
        folder: where those that are built in lie, and what the entry-point group is called.
        what: one of them, in the kind of a problem.
        unknown: what is said of a ``{name}`` that nothing has.
    """

    def __init__(self, folder: str, what: str, unknown: str) -> None:
        self._folder = folder
        self._what = what
        self._unknown = unknown

    def __contains__(self, name: object) -> bool:
        return name in _built_in(self._folder) or name in self._found()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._found()))

    def __len__(self) -> int:
        return len(self._found())

    def text(self, name: str) -> str:
        """The JSON text of one of them.

        Raises:
            InvalidInput: none is called that.
        """
        found = self._found()
        if name not in found:
            raise InvalidInput(
                Problem(
                    f"unknown-{self._what}",
                    self._unknown.format(name=repr(name)),
                    hint=did_you_mean(name, sorted(found)),
                )
            )
        return _text(name, found[name])

    def parsed(self, name: str, parse: Callable[[str, str], AnyNamed]) -> AnyNamed:
        """One of them, held to its schema.

        Raises:
            InvalidInput: none is called that, or it does not hold.
        """
        file = f"{self._what} {name}"
        document = parse(self.text(name), file)
        if document.name != name:
            # Whoever reads the output looks it up by the name that it gives itself.
            raise InvalidInput(
                Problem(
                    f"misnamed-{self._what}",
                    f"registered as {name!r}, it calls itself {document.name!r}",
                    hint="Ask its author to register it under its own name.",
                    file=file,
                    pointer="/name",
                )
            )
        return document

    def _found(self) -> Mapping[str, Traversable | EntryPoint]:
        return _documents(self._folder, f"quantrecipe.{self._folder}")


LAYOUTS: Final = KnownDocuments("layouts", "layout", "no layout is called {name}")
NAMES: Final = KnownDocuments("names", "names", "no names are called {name}")
RECIPES: Final = KnownDocuments(
    "recipes", "recipe", "no built-in recipe is called {name}, and no such file exists"
)


@cache
def named_layout(name: str) -> Layout:
    """A known layout.

    Raises:
        InvalidInput: no layout is called that, or it does not hold to the schema.
    """
    from quantrecipe.schema.validation import parse_layout

    return LAYOUTS.parsed(name, parse_layout)


@cache
def named_names(name: str) -> Names:
    """Known names of modules.

    Raises:
        InvalidInput: no names are called that, or they do not hold to the schema.
    """
    from quantrecipe.schema.validation import parse_names

    return NAMES.parsed(name, parse_names)


def resolve_layout(reference: str | Layout) -> Layout:
    """The layout that a recipe names or holds inline."""
    return named_layout(reference) if isinstance(reference, str) else reference


def resolve_names(reference: str | tuple[NameMapping, ...] | None) -> tuple[NameMapping, ...]:
    """The entries that a recipe names or holds inline; none, where it says nothing."""
    return named_names(reference).names if isinstance(reference, str) else reference or ()


def layout_names() -> list[str]:
    """Every known layout."""
    return list(LAYOUTS)


def recipe_names() -> list[str]:
    """Every known recipe."""
    return list(RECIPES)


def recipe_text(name: str) -> str:
    """The JSON text of a known recipe.

    Raises:
        InvalidInput: no recipe is called that.
    """
    return RECIPES.text(name)


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
