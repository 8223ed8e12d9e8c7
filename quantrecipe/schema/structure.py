"""Which kind and version a document says it is, and whether it has that structure.

The tags are read first, and only the model that they name is asked, so that nobody has to guess
which of several complaints is meant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from pydantic import ValidationError

from quantrecipe.schema.base import Model
from quantrecipe.schema.evaluated import EVALUATION_VERSION, Evaluated
from quantrecipe.schema.layout import LAYOUT_VERSION, Layout
from quantrecipe.schema.lock import LOCK_VERSION, Lock
from quantrecipe.schema.messages import is_echo, problem_of
from quantrecipe.schema.names import NAMES_VERSION, Names
from quantrecipe.schema.parsed import capped, describe
from quantrecipe.schema.problems import Problem, did_you_mean
from quantrecipe.schema.recipe import RECIPE_VERSION, Recipe
from quantrecipe.schema.statistics import STATISTICS_VERSION, Statistics

MODELS: Final[Mapping[str, type[Model]]] = MappingProxyType(
    {
        "recipe": Recipe,
        "layout": Layout,
        "names": Names,
        "lock": Lock,
        "statistics": Statistics,
        "evaluation": Evaluated,
    }
)
"""The model of each kind of document."""

VERSIONS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "recipe": RECIPE_VERSION,
        "layout": LAYOUT_VERSION,
        "names": NAMES_VERSION,
        "lock": LOCK_VERSION,
        "statistics": STATISTICS_VERSION,
        "evaluation": EVALUATION_VERSION,
    }
)
"""The version of each kind of document that is read and written."""


def build(value: Any, kind: str) -> Model:
    """The model of a JSON value.

    Raises:
        pydantic.ValidationError: it does not have the structure of its kind.
    """
    # As text, because a list is no tuple to a strict model, but an array is.
    return MODELS[kind].model_validate_json(json.dumps(value))


def structure_problems(value: Any, kind: str) -> tuple[Problem, ...]:
    """What keeps a JSON value from being a document of this kind: what its schema refuses."""
    try:
        build(value, kind)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        problems = (problem_of(kind, value, each) for each in errors if not is_echo(each))
        return capped(problems, "errors of structure")
    return ()


def tag_problem(value: Any, kind: str | None = None) -> Problem | None:
    """Why it cannot be said what a value should look like: its kind or its version.

    Args:
        value: a JSON value.
        kind: the one kind that will do; any if left out.
    """
    if not isinstance(value, dict):
        return Problem("wrong-type", f"expected an object, found {describe(value)}", pointer="")
    found = value.get("kind")
    known = " or ".join(repr(name) for name in ([kind] if kind else MODELS))
    if "kind" not in value:
        message = "the field 'kind' is missing, which says what the document is"
        return Problem("missing-field", message, f"Expected {known}.", pointer="/kind")
    if not isinstance(found, str):
        message = f"expected {known}, found {describe(found)}"
        return Problem("wrong-type", message, pointer="/kind")
    if found not in MODELS:
        message = f"no kind of document is called {found!r}"
        return Problem("unknown-value", message, did_you_mean(found, list(MODELS)), pointer="/kind")
    if kind is not None and found != kind:
        message = f"expected a {kind}, found a {found}"
        return Problem("wrong-kind", message, pointer="/kind")
    return _version_problem(value.get("version"), found)


def _version_problem(version: Any, kind: str) -> Problem | None:
    """What has another version is not held to this one; what has none is."""
    if type(version) is not int or version == VERSIONS[kind]:
        return None
    if version > VERSIONS[kind]:
        return Problem(
            "newer-version",
            f"this is version {version} of a {kind}; the newest known here is {VERSIONS[kind]}",
            "Update quantrecipe.",
            pointer="/version",
        )
    # Migrations check what they read and write with this module.
    from quantrecipe.schema.migrations import CHAINS

    if version in CHAINS[kind].steps:
        message = f"this is version {version} of a {kind}; the current one is {VERSIONS[kind]}"
        hint = "`quantrecipe migrate` brings it up to date."
        return Problem("older-version", message, hint, pointer="/version")
    message = f"there is no version {version} of a {kind}"
    return Problem("unknown-version", message, f"Write {VERSIONS[kind]}.", pointer="/version")
