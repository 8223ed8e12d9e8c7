"""What a component of a pipeline consists of, in a folder or a repository."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from quantrecipe.checkpoint.folder import INDEX_SUFFIX, SUFFIXES, look_into
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import InvalidInput, Problem

PIPELINE_NAME: Final = "model_index.json"

# What configures weights, or turns text into tokens. No program: none is run.
_BESIDE: Final = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*")
_LARGEST_BESIDE: Final = 64 << 20

_PLAIN: Final = re.compile(r"[^.]+\.safetensors")
"""Weights of no variant: those have it in their names, as in ``model.fp16.safetensors``."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a pipeline says that it consists of.

    Attributes:
        class_name: its class in diffusers.
        components: the library and the class of each, by name.
    """

    class_name: str
    components: Mapping[str, tuple[str, str]]


def read_pipeline(root: Location) -> Pipeline | None:
    """What the folder of a pipeline says of it; ``None``: it is none.

    Raises:
        InvalidInput: what says so is no JSON object.
        HubError: the repository cannot be read.
    """
    index = root / PIPELINE_NAME
    if not index.is_file():
        return None
    try:
        document: Any = json.loads(index.read_bytes())
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        message = "is no JSON object"
        raise InvalidInput(Problem("bad-pipeline", message, file=str(index)))
    components = {
        name: (str(what[0]), str(what[-1]))
        for name, what in document.items()
        if isinstance(what, list) and any(what) and re.fullmatch(r"\w[\w.-]*", name)
    }
    return Pipeline(str(document.get("_class_name", "")), components)


def pipeline_files(root: Location, without: Collection[str]) -> Mapping[str, int]:
    """What a pipeline needs to run when some components are had from elsewhere.

    Args:
        root: of the pipeline's repository.
        without: components whose weights are not needed; their configuration is.

    Returns:
        sizes in bytes by path below ``root``, sorted.

    Raises:
        InvalidInput: it is no pipeline.
        HubError: the repository cannot be read.
    """
    found = {
        file.relative_to(root).as_posix(): file.stat().st_size
        for file in pipeline_locations(root, [], without)
    }
    return dict(sorted(found.items()))


def pipeline_locations(
    root: Location, notes: list[str], without: Collection[str] = ()
) -> Iterator[Location]:
    """The files that a pipeline needs to run; see ``pipeline_files``."""
    found = read_pipeline(root)
    if found is None:
        raise InvalidInput(
            Problem(
                "no-pipeline",
                f"there is no {PIPELINE_NAME}: it is no pipeline",
                hint="Leave --pipeline out, or name the folder that holds the pipeline.",
                file=str(root / PIPELINE_NAME),
            )
        )
    yield root / PIPELINE_NAME
    yield from beside(root)
    for name in found.components:
        folder = root / name
        if folder.is_dir():
            yield from beside(folder) if name in without else component(folder, notes)


def component(folder: Location, notes: list[str]) -> Iterator[Location]:
    """What is needed of a folder whose weights are not those of a recipe."""
    found = look_into(folder)
    plain = [name for name in found.files if _PLAIN.fullmatch(name)]
    yield from (folder / name for name in plain or found.files)
    yield from beside(folder)
    if found.foreign and not found.files:
        notes.append(f"{folder.name}: only {', '.join(found.foreign)}, which is not fetched")


def beside(folder: Location) -> Iterator[Location]:
    """The small files in a folder that configure what lies there."""
    for file in folder.iterdir():
        if (
            any(fnmatchcase(file.name, pattern) for pattern in (*_BESIDE, f"*{INDEX_SUFFIX}"))
            and not file.name.endswith(SUFFIXES)
            and file.is_file()
            and file.stat().st_size <= _LARGEST_BESIDE
        ):
            yield file
