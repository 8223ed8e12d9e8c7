"""Documents held to their schema, with every problem at once and each in its place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar

from quantrecipe.schema.base import Model
from quantrecipe.schema.document import Document, located, parse_text, read_parsed
from quantrecipe.schema.evaluated import Evaluated
from quantrecipe.schema.evaluation_semantics import evaluated_problems
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_semantics import layout_problems
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import Lock
from quantrecipe.schema.names import Names
from quantrecipe.schema.names_semantics import names_problems
from quantrecipe.schema.parsed import Parsed, capped
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.semantics import lock_problems, recipe_problems, statistics_problems
from quantrecipe.schema.statistics import STATISTICS_KEY, Statistics
from quantrecipe.schema.structure import MODELS, build, structure_problems, tag_problem

Source = str | PathLike[str] | Location
AnyModel = TypeVar("AnyModel", bound=Model)


@dataclass(frozen=True, slots=True)
class Examined:
    """A file, looked at from all sides.

    Attributes:
        file: as it was given.
        kind: what it says it is, where that could be read.
        problems: everything that does not hold, in the order of the text.
        document: the document, if its text has no fault of its own.
        model: what it says, if nothing is wrong with it.
    """

    file: str
    kind: str | None
    problems: tuple[Problem, ...]
    document: Document | None = None
    model: Model | None = None


def known_layouts() -> Collection[str]:
    """The names that a recipe may call a layout by."""
    # The registry reads its layouts through this module.
    from quantrecipe.schema.registry import LAYOUTS

    return LAYOUTS


def known_names() -> Collection[str]:
    """What a recipe may call names of modules by."""
    from quantrecipe.schema.registry import NAMES

    return NAMES


def validate_value(
    value: Any,
    *,
    kind: str | None = None,
    layouts: Collection[str] | None = None,
    names: Collection[str] | None = None,
) -> tuple[Problem, ...]:
    """Every problem of a JSON value as the kind of document that it says it is.

    Args:
        value: the document.
        kind: the one kind that will do; any if left out.
        layouts: the layouts that are known by name; those of the registry if left out.
        names: the names of modules that are known by a name; likewise.

    Returns:
        Problems with JSON pointers, those of structure first.
    """
    tags = tag_problem(value, kind)
    if tags is not None:
        return (tags,)
    structure = structure_problems(value, value["kind"])
    known = {problem.pointer for problem in structure}
    semantic = (p for p in _semantic_problems(value, layouts, names) if p.pointer not in known)
    return (*structure, *capped(semantic, "errors of meaning"))


def validate_document(
    document: Document, *, kind: str | None = None, layouts: Collection[str] | None = None
) -> tuple[Problem, ...]:
    """Every problem of a document, located, in the order of its text."""
    found = validate_value(document.value, kind=kind, layouts=layouts)
    return _in_order(document.locate(problem) for problem in found)


def examine(source: Source, *, kind: str | None = None) -> Examined:
    """Look at a file: its text, its structure, and what it says.

    Args:
        source: a path, or ``-`` for standard input.
        kind: the one kind that will do; any if left out.

    Raises:
        InvalidInput: the file cannot be read at all (kind ``unreadable``).
    """
    return examine_text(read_parsed(source), kind=kind)


def examine_text(parsed: Parsed, *, kind: str | None = None) -> Examined:
    """Look at a text as ``examine`` does; faults of the text do not hide those of what it says."""
    found = parsed.value.get("kind") if isinstance(parsed.value, dict) else None
    said = found if isinstance(found, str) and found in MODELS else None
    if not parsed.complete:
        return Examined(parsed.file, said, parsed.problems)
    document = Document(parsed.file, parsed.value, parsed)
    faulty = {problem.pointer for problem in parsed.problems}
    problems = [p for p in validate_document(document, kind=kind) if p.pointer not in faulty]
    if problems or parsed.problems or said is None:
        clean = None if parsed.problems else document
        return Examined(parsed.file, said, _in_order([*parsed.problems, *problems]), clean)
    return Examined(parsed.file, said, (), document, build(parsed.value, said))


def load_document(source: Source) -> tuple[Document, Model]:
    """Read and check a document of any kind.

    Raises:
        InvalidInput: it cannot be read, or does not hold; every problem is in it.
    """
    return _accept(examine(source))


def load_recipe(source: Source) -> Recipe:
    """Read and check a recipe; a path, or ``-`` for standard input.

    Raises:
        InvalidInput: it cannot be read, or does not hold; every problem is in it.
    """
    return _only(Recipe, examine(source, kind="recipe"))


def load_layout(source: Source) -> Layout:
    """Read and check a layout.

    Raises:
        InvalidInput: it cannot be read, or does not hold; every problem is in it.
    """
    return _only(Layout, examine(source, kind="layout"))


def load_lock(source: Source) -> Lock:
    """Read and check a lock, the digest of its recipe included.

    Raises:
        InvalidInput: it cannot be read, or does not hold; every problem is in it.
    """
    return _only(Lock, examine(source, kind="lock"))


def load_evaluation(source: Source) -> Evaluated:
    """Read and check an evaluation; a path, or ``-`` for standard input.

    Raises:
        InvalidInput: it cannot be read, does not hold, or claims what it has not tested; every
            problem is in it.
    """
    return _only(Evaluated, examine(source, kind="evaluation"))


def load_statistics_header(text: str | bytes, file: str = STATISTICS_KEY) -> Statistics:
    """Check the header of a statistics file: the text under ``quantrecipe.statistics``.

    Raises:
        InvalidInput: it does not hold; every problem is in it.
    """
    return _only(Statistics, examine_text(parse_text(text, file), kind="statistics"))


def parse_recipe(text: str | bytes, file: str = "<text>") -> Recipe:
    """Check the text of a recipe; ``file`` is what problems call it, and YAML if it ends so.

    Raises:
        InvalidInput: it does not hold; every problem is in it.
    """
    return _only(Recipe, examine_text(parse_text(text, file), kind="recipe"))


def parse_layout(text: str | bytes, file: str = "<text>") -> Layout:
    """Check the text of a layout; ``file`` is what problems call it, and YAML if it ends so.

    Raises:
        InvalidInput: it does not hold; every problem is in it.
    """
    return _only(Layout, examine_text(parse_text(text, file), kind="layout"))


def parse_names(text: str | bytes, file: str = "<text>") -> Names:
    """Check the text of names; ``file`` is what problems call it, and YAML if it ends so.

    Raises:
        InvalidInput: they do not hold; every problem is in it.
    """
    return _only(Names, examine_text(parse_text(text, file), kind="names"))


def _semantic_problems(
    value: Any, layouts: Collection[str] | None, names: Collection[str] | None
) -> Iterator[Problem]:
    kind = value["kind"]
    if kind == "layout":
        return layout_problems(value)
    if kind == "names":
        return names_problems(value.get("names"), "/names")
    if kind == "statistics":
        return statistics_problems(value)
    if kind == "evaluation":
        return evaluated_problems(value)
    check = recipe_problems if kind == "recipe" else lock_problems
    return check(
        value,
        known_layouts() if layouts is None else layouts,
        known_names() if names is None else names,
    )


def _accept(examined: Examined) -> tuple[Document, Model]:
    if examined.document is None or examined.model is None:
        raise InvalidInput(examined.problems)
    return examined.document, examined.model


def _only(model: type[AnyModel], examined: Examined) -> AnyModel:
    _, found = _accept(examined)
    assert isinstance(found, model)
    return found


def _in_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    return tuple(sorted(problems, key=lambda problem: (problem.line or 0, problem.column or 0)))


__all__ = [
    "Document",
    "Examined",
    "examine",
    "examine_text",
    "known_layouts",
    "known_names",
    "load_document",
    "load_evaluation",
    "load_layout",
    "load_lock",
    "load_recipe",
    "load_statistics_header",
    "located",
    "parse_layout",
    "parse_names",
    "parse_recipe",
    "structure_problems",
    "validate_document",
    "validate_value",
]
