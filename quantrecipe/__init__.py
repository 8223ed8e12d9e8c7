"""Declarative, recipe-driven quantization of checkpoints.

The rooms, from the ground up: ``schema`` (recipes, layouts, plans; no torch), ``formats`` and
``checkpoint``, then ``converter``, ``loaders`` and ``testing``, then ``cli``.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("quantrecipe")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
