"""Recipes, layouts, locks and statistics: their models, how they are read, and rules to plan."""

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
