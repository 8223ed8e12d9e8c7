"""How a published checkpoint is run: which script lies beside it, and what that needs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from quantrecipe.checkpoint.errors import SourceError
from quantrecipe.checkpoint.hub.pulling import PIPELINE_NAME, pipeline_components, plan_pipeline
from quantrecipe.publishing.facts import Needed, Usage
from quantrecipe.publishing.scripts import Component, Network, models_script, pipeline_script
from quantrecipe.schema.address import HubAddress
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import Lock
from quantrecipe.schema.names import NameMapping
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.quantization_config import CONFIG_NAME
from quantrecipe.schema.registry import NAMES, resolve_names
from quantrecipe.schema.renaming import new_names

_ALWAYS: Final = ("torch", "safetensors")
_LARGEST_SCRIPT: Final = 1 << 20

Renamed = tuple[tuple[str, tuple[str, ...]], ...]
"""Names of stored modules to what a class calls them, or their rows: see ``usage.py``."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline that parts of a checkpoint belong to.

    Attributes:
        address: the repository that has its other components.
        root: the same, at its commit.
        gated: whether that asks for terms to be accepted.
    """

    address: HubAddress
    root: Location
    gated: bool


def own_usage(script: Path) -> Usage:
    """A script of the user's own.

    Raises:
        InvalidInput: it is no Python.
        SourceError: the system could not read it.
    """
    try:
        content = script.read_bytes()
    except OSError as error:
        raise SourceError(script, error) from error
    try:
        if len(content) > _LARGEST_SCRIPT:
            raise ValueError("it is larger than 1 MiB")
        compile(content, script.name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        message = f"is no Python: {error}"
        raise InvalidInput(Problem("bad-script", message, file=str(script))) from error
    packages = (*_ALWAYS, *(name for name in ("diffusers", "transformers") if name.encode() in content))
    return Usage(content, packages, "python usage.py --help", "says how it is called")
''' if False else ''
