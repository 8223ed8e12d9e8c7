"""The small files beside the weights, held to their lock; each is read once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantrecipe.checkpoint import SourceError
from quantrecipe.checkpoint.folder import INDEX_SUFFIX, SUFFIX
from quantrecipe.evaluate.locked import AGAIN, is_below, rewritten
from quantrecipe.schema.canonical import document_bytes, recipe_digest
from quantrecipe.schema.config_fragments import config_fragment
from quantrecipe.schema.lock import RECIPE_NAME, Lock, OutputFile
from quantrecipe.schema.placement import shard_of
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.quantization_config import (
    CONFIG_KEY,
    ConfiguredModule,
    config_path,
)
from quantrecipe.schema.registry import resolve_layout
from quantrecipe.schema.validation import parse_recipe


def check_sidecars(folder: Path, lock: Lock) -> Iterator[Problem]:
    """Hold every file that is no safetensors file to its lock.

    What a recipe and an index of shards have to be follows from the rest of the lock as well, which
    says better what is wrong with them than a digest does.

    Raises:
        SourceError: a file is there and cannot be read.
    """
    listed = {file.path: file for file in lock.sidecars if is_below(file.path)}
    indexes, configs = shard_indexes(lock), written_configs(lock)
    for path in dict.fromkeys([RECIPE_NAME, *indexes, *configs, *listed]):
        file = folder.joinpath(*path.split("/"))
        content = _read(file)
        if content is None:
            yield Problem("missing-file", "the lock vouches for it", AGAIN, file=str(file))
            continue
        faults: tuple[Problem, ...] = ()
        if path == RECIPE_NAME:
            faults = _recipe_faults(file, content, lock)
        elif path in indexes:
            faults = _index_faults(file, content, indexes[path])
        elif path in configs:
            faults = _config_faults(file, content, configs[path])
        if not faults and path in listed and not _is_same(content, listed[path]):
            faults = (_changed(file, path in indexes),)
        yield from faults


def shard_indexes(lock: Lock) -> dict[str, object]:
    """The index of every set of shards, as the lock's tensors make it, by path."""
    maps: dict[str, dict[str, str]] = {}
    sizes: dict[str, int] = {}
    places: dict[str, str | None] = {}
    for _, tensor in lock.tensors():
        if tensor.file not in places:
            places[tensor.file] = _index_of(tensor.file)
        path = places[tensor.file]
        if path is None:
            continue
        maps.setdefault(path, {})[tensor.name] = tensor.file.rpartition("/")[2]
        sizes[path] = sizes.get(path, 0) + tensor.bytes
    return {
        path: {"metadata": {"total_size": sizes[path]}, "weight_map": weight_map}
        for path, weight_map in maps.items()
    }


def written_configs(lock: Lock) -> dict[str, dict[str, Any]]:
    """The ``quantization_config`` of every part, as the lock's modules make it, by the file."""
    recipe = lock.recipe
    layout = resolve_layout(recipe.target.layout)
    found = {}
    for part in recipe.source.parts:
        config = config_fragment(
            layout,
            (
                ConfiguredModule.of(module, module.tensors)
                for module in lock.modules
                if module.part == part
            ),
        )
        if config is not None:
            found[config_path(recipe.target.file_of(part))] = config
    return found


def _index_of(path: str) -> str | None:
    home = shard_of(path) if is_below(path) else None
    return home.removesuffix(SUFFIX) + INDEX_SUFFIX if home is not None else None


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes() if file.is_file() else None
    except OSError as error:
        raise SourceError(file, error) from error


def _is_same(content: bytes, said: OutputFile) -> bool:
    return len(content) == said.bytes and hashlib.sha256(content).hexdigest() == said.sha256


def _changed(file: Path, is_index: bool) -> Problem:
    if is_index:
        return rewritten(file)
    return Problem("digest-mismatch", "its bytes are not those written", AGAIN, file=str(file))


def _recipe_faults(file: Path, text: bytes, lock: Lock) -> tuple[Problem, ...]:
    """Why the recipe beside the lock is not the one in it."""
    if text == document_bytes(lock.recipe.to_json_value()):
        return ()
    try:
        recipe = parse_recipe(text, str(file))
    except InvalidInput as error:
        return error.problems
    if recipe_digest(recipe) == lock.recipe_sha256:
        return (rewritten(file),)
    hint = "One of the two was edited or is of another conversion."
    return (Problem("recipe-differs", "is not the recipe of the lock", hint, file=str(file)),)


def _index_faults(file: Path, text: bytes, expected: object) -> tuple[Problem, ...]:
    """Why an index of shards does not say where the lock's tensors are."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return (Problem("bad-index", "is not an index", AGAIN, file=str(file)),)
    if found == expected:
        return ()
    return (Problem("bad-index", _difference(found, expected), AGAIN, file=str(file)),)


def _config_faults(file: Path, text: bytes, expected: object) -> tuple[Problem, ...]:
    """Why a ``config.json`` does not say how the lock's modules are stored."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and document.get(CONFIG_KEY) == expected:
        return ()
    message = f"its {CONFIG_KEY} is not that of the lock's modules"
    return (Problem("config-differs", message, AGAIN, file=str(file)),)


def _difference(found: object, expected: object) -> str:
    assert isinstance(expected, dict)
    there = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(there, dict):
        return "has no weight_map"
    wanted = expected["weight_map"]
    names = sorted(there.keys() ^ wanted.keys())
    names += sorted(name for name in there.keys() & wanted.keys() if there[name] != wanted[name])
    if not names:
        return "says otherwise than the lock of the size of all tensors, or more than that"
    return f"says otherwise than the lock of {len(names)} tensor(s), the first {names[0]!r}"
