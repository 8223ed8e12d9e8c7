"""Declarative, recipe-driven quantization of checkpoints.

The rooms, from the ground up: ``schema`` (recipes, layouts, plans; no torch), ``formats`` and
``checkpoint``, then ``converter``, ``loaders`` and ``testing``, then ``cli``.
"""

from typing import Any

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Looked up when asked for: reading installed metadata takes longer than most imports here.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("quantrecipe")
    except PackageNotFoundError:
        return "0+unknown"
