"""Finding a converter, and holding a recipe against what it declares."""

from __future__ import annotations

from typing import Any

from quantrecipe.converter.protocol import Converter
from quantrecipe.schema.capabilities import Need, missing, needs
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import entry_points_by_name, load_named, resolve_layout

GROUP = "quantrecipe.converters"


def converter_names() -> list[str]:
    """Every converter that is installed."""
    return sorted(entry_points_by_name(GROUP))


def find_converter(name: str) -> Converter:
    """A converter by name.

    Raises:
        InvalidInput: none is called that, it cannot be loaded, or what is registered is no
            converter.
    """
    made: Any = load_named(GROUP, name, "converter")()
    if not isinstance(made, Converter):
        raise InvalidInput(
            Problem(
                "not-a-converter",
                f"what is registered as converter {name!r} lacks a name, a version, capabilities "
                "or a convert method",
                hint="quantrecipe.converter.Converter says what one needs.",
            )
        )
    return made


def check_capabilities(recipe: Recipe, converter: Converter) -> None:
    """Refuse what ``converter`` cannot do, and say who could.

    Raises:
        InvalidInput: one problem for each thing that is missing.
    """
    wanted = needs(
        recipe,
        [
            (resolve_layout(recipe.source.layout).name, "/source/layout"),
            (resolve_layout(recipe.target.layout).name, "/target/layout"),
        ],
    )
    lacking = missing(converter.capabilities, wanted)
    if not lacking:
        return
    others = [name for name in converter_names() if name != converter.name]
    able = [name for name in others if _could(name, wanted)]
    hint = (
        f"Could do it: {', '.join(able)} (--converter)."
        if able
        else "No installed converter can do all that the recipe asks for."
    )
    raise InvalidInput(
        Problem(
            "converter-lacks",
            f"converter {converter.name!r} has no {need}",
            hint=hint,
            pointer=need.pointer,
        )
        for need in lacking
    )


def _could(name: str, wanted: tuple[Need, ...]) -> bool:
    try:
        return not missing(find_converter(name).capabilities, wanted)
    except InvalidInput:  # a broken one is no help, and no reason to fail
        return False
