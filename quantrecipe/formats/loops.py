"""Loading compiled loops, which are optional: the extra ``fast`` brings what compiles them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def load_loops(name: str) -> ModuleType | None:
    """The module ``name`` of ``quantrecipe.formats``, if it can be had here."""
    if find_spec("numba") is None:
        return None
    try:
        return import_module(f"quantrecipe.formats.{name}")
    except (ImportError, OSError):
        # There, but not for this Python, this NumPy or this processor.
        return None
