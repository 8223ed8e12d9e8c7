"""What two checkpoints say beside their numbers: safetensors metadata and ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

from quantrecipe.evaluate.comparison.pairing import Pair
from quantrecipe.evaluate.comparison.records import Setting
from quantrecipe.evaluate.comparison.sides import OpenedPart, Side, config_beside
from quantrecipe.schema.canonical import recipe_digest
from quantrecipe.schema.location import Location
from quantrecipe.schema.planning import METADATA_KEY
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.quantization_config import CONFIG_NAME

_LONGEST: Final = 120
_MOST: Final = 1000


def metadata_differences(a: Side, b: Side) -> Iterator[Setting]:
    """Keys of the safetensors metadata that say something else, over all files of each."""
    ours, theirs = _metadata(a), _metadata(b)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            texts = [_said(side, key, found) for side, found in ((a, ours), (b, theirs))]
            yield Setting("metadata", key, *texts)


def _metadata(side: Side) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for file in side.files:
        for key, value in file.metadata.items():
            found.setdefault(key, set()).add(value)
    return {key: tuple(sorted(values)) for key, values in found.items()}


def _said(side: Side, key: str, found: Mapping[str, tuple[str, ...]]) -> str | None:
    values = found.get(key)
    if values is None:
        return None
    if key == METADATA_KEY and side.recipe is not None:
        return f"the recipe {side.recipe.name} ({recipe_digest(side.recipe)[:12]})"
    more = f" and {len(values) - 1} other values" if len(values) > 1 else ""
    return _shortened(values[0]) + more


def config_differences(pairs: Iterable[Pair], *, folders: bool) -> list[Setting]:
    """Where the ``config.json`` beside a part says something else, or is there for one only.

    Args:
        pairs: the parts.
        folders: whether what lies beside weights belongs to them: around a single file there may be
            anything, so a file that is missing there says nothing.

    Raises:
        InvalidInput: one is no JSON object.
        SourceError: one cannot be read.
    """
    both = {
        (pair.a.source.root, pair.b.source.root): (pair.a, pair.b)
        for pair in pairs
        if pair.a is not None and pair.b is not None
    }
    found: list[Setting] = []
    for a, b in both.values():
        found += islice(_of_parts(a, b, folders), max(0, _MOST - len(found)))
    return found


def _of_parts(a: OpenedPart, b: OpenedPart, folders: bool) -> Iterator[Setting]:
    paths = [part.source.root / CONFIG_NAME for part in (a, b)]
    ours, theirs = (path if path.is_file() else None for path in paths)
    if ours is None or theirs is None:
        if folders and ours is not theirs:
            yield Setting(_name(b if ours is None else a), "", _there(ours), _there(theirs))
        return
    if ours.samefile(theirs):
        return
    both = config_beside(a.source), config_beside(b.source)
    try:
        for pointer, one, other in json_differences(*both):
            yield Setting(_name(a), pointer, one, other)
    except RecursionError:
        message = f"is nested too deeply to be compared with {theirs}"
        raise InvalidInput(Problem("bad-sidecar", message, file=str(ours))) from None


def _there(path: Location | None) -> str | None:
    return None if path is None else "is there"


def _name(part: OpenedPart) -> str:
    folder = Path(part.location)
    if folder.suffix:
        folder = folder.parent
    return (folder / CONFIG_NAME).as_posix()


def json_differences(
    a: Any, b: Any, pointer: str = ""
) -> Iterator[tuple[str, str | None, str | None]]:
    """Where two JSON values differ, as far inside as it can be said.

    Yields:
        A JSON pointer, and what stands there in each, shortened; ``None``: nothing.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            below = f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}"
            if key in a and key in b:
                yield from json_differences(a[key], b[key], below)
            else:
                one, other = (_json(each[key]) if key in each else None for each in (a, b))
                yield below, one, other
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from json_differences(one, other, f"{pointer}/{index}")
    elif _json_text(a) != _json_text(b):
        yield pointer, _json(a), _json(b)


def _json(value: Any) -> str:
    text = _shortened(_json_text(value))
    return f"{text} of {len(value):,}" if isinstance(value, list) and "..." in text else text


def _json_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}... ({len(text):,} characters)"
