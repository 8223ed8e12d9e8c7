"""Functions of the user's own, named on the command line."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import click


def find_function(text: str, option: str) -> Callable[..., Any]:
    """The function that ``MODULE:FUNCTION`` names; modules in the working folder count.

    Args:
        text: what the user gave.
        option: the option that it was given to, ``--run``.

    Raises:
        click.BadParameter: there is no such function.
    """
    where = repr(option)
    module, _, attribute = text.partition(":")
    if not module or not attribute:
        raise click.BadParameter(f"{text!r}: give MODULE:FUNCTION.", param_hint=where)
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = pkgutil.resolve_name(text)
    except (ImportError, AttributeError, ValueError) as error:
        raise click.BadParameter(f"{text!r}: {error}.", param_hint=where) from error
    if not callable(found):
        raise click.BadParameter(f"{text!r} is no function.", param_hint=where)
    function: Callable[..., Any] = found
    return function
