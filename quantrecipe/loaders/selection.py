"""Finding a loader, and holding a checkpoint's recipe against what it declares."""

from __future__ import annotations

from typing import Any

from quantrecipe.loaders.checkpoint import Checkpoint
from quantrecipe.loaders.protocol import Loader
from quantrecipe.schema.capabilities import Need, missing, needs
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.registry import entry_points_by_name, load_named

GROUP = "quantrecipe.loaders"


def loader_names() -> list[str]:
    """Every loader that is installed."""
    return sorted(entry_points_by_name(GROUP))


def find_loader(name: str, checkpoint: Checkpoint | None = None) -> Loader:
    """A loader by name, able to read ``checkpoint`` if one is given.

    Raises:
        InvalidInput: none is called that, it cannot be loaded, what is registered is no loader, or
            it lacks something that the checkpoint's recipe asks for.
    """
    made = _load(name)
    if checkpoint is not None and checkpoint.recipe is not None:
        wanted = needs(checkpoint.recipe, [(checkpoint.layout.name, "/target/layout")])
        lacking = missing(made.capabilities, wanted)
        if lacking:
            others = [other for other in loader_names() if other != name]
            able = [other for other in others if _could(other, wanted)]
            raise InvalidInput(
                Problem(
                    "loader-lacks",
                    f"loader {name!r} has no {need}",
                    hint=f"Could read it: {', '.join(able)}."
                    if able
                    else "No installed loader can read all that the recipe asks for.",
                    pointer=need.pointer,
                )
                for need in lacking
            )
    return made


def _could(name: str, wanted: tuple[Need, ...]) -> bool:
    try:
        return not missing(_load(name).capabilities, wanted)
    except InvalidInput:  # a broken one is no help, and no reason to fail
        return False


def _load(name: str) -> Loader:
    made: Any = load_named(GROUP, name, "loader")()
    if not isinstance(made, Loader):
        raise InvalidInput(
            Problem(
                "not-a-loader",
                f"what is registered as loader {name!r} lacks a name, capabilities or a "
                "load_state_dict method",
                hint="quantrecipe.loaders.Loader says what one needs.",
            )
        )
    return made
