"""Recipes, layouts, locks and statistics: their models, how they are read, and rules to plan."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from quantrecipe.schema.canonical import recipe_digest
    from quantrecipe.schema.layout import Layout
    from quantrecipe.schema.lock import Lock
    from quantrecipe.schema.plan import Plan
    from quantrecipe.schema.problems import InvalidInput, OutputError, Problem, QuantrecipeError
    from quantrecipe.schema.recipe import Recipe
    from quantrecipe.schema.statistics import Statistics
    from quantrecipe.schema.validation import load_layout, load_lock, load_recipe

__all__ = [
    "InvalidInput",
    "Layout",
    "Lock",
    "OutputError",
    "Plan",
    "Problem",
    "QuantrecipeError",
    "Recipe",
    "Statistics",
    "load_layout",
    "load_lock",
    "load_recipe",
    "recipe_digest",
]

_HOMES: Final = {
    "InvalidInput": "problems",
    "Layout": "layout",
    "Lock": "lock",
    "OutputError": "problems",
    "Plan": "plan",
    "Problem": "problems",
    "QuantrecipeError": "problems",
    "Recipe": "recipe",
    "Statistics": "statistics",
    "load_layout": "validation",
    "load_lock": "validation",
    "load_recipe": "validation",
    "recipe_digest": "canonical",
}


def __getattr__(name: str) -> Any:
    # Loaded when asked for: validating one recipe does not pay for everything else in this room.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
