"""Small files beside the source that still hold for the output, and are kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, Final

from quantrecipe.schema.config_fragments import config_fragment
from quantrecipe.schema.location import Location
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.quantization_config import (
    CONFIG_KEY,
    CONFIG_NAME,
    ConfiguredModule,
    config_path,
)
from quantrecipe.schema.tensors import SourcePart

# Known names only: a source may lie in a folder of unrelated files. A model card is not among them:
# it describes other weights.
KEPT: Final = (
    "config.json",
    "*_config.json",
    "modules.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
    "LICENSE*",
    "NOTICE*",
)
# They say how the source was quantized, which the output is not.
NOT_KEPT: Final = ("*quant*_config.json",)
_LARGEST: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A small file of the output.

    Attributes:
        path: below the output folder.
        content: its bytes.
        origin: the file of the source that it was made from; ``None`` if there is none.
    """

    path: str
    content: bytes
    origin: Location | None


def find_sidecars(plan: Plan) -> tuple[Sidecar, ...]:
    """What is kept from beside each part, and where it goes.

    Beside the part's own file where it has one, else below a folder of the part's name, else (a
    single part) into the output folder itself. Parts from different folders never share one: there,
    too, each gets a folder of its name. ``quantization_config`` is taken out of a ``config.json``:
    it describes how the source was quantized. Where the target layout says so, one that describes
    the output takes its place, in a new file if the source has no ``config.json``.

    Raises:
        InvalidInput: a ``config.json`` that it should go into is no JSON object.
    """
    found: dict[str, Sidecar] = {}
    for part in plan.parts:
        folder = _folder_of(plan, part)
        for file in _kept(part.root):
            path = str(folder / file.name)
            found[path] = Sidecar(path, _still_true(file), file)
        fragment = _fragment(plan, part.name)
        if fragment is not None:
            path = config_path(plan.recipe.target.file_of(part.name))
            found[path] = _configured(path, found.get(path), fragment)
    return tuple(found.values())


def _folder_of(plan: Plan, part: SourcePart) -> PurePosixPath:
    target = plan.recipe.target
    if target.parts is not None:
        folder = PurePosixPath(target.parts[part.name]).parent
        roots = {
            other.root
            for other in plan.parts
            if PurePosixPath(target.parts[other.name]).parent == folder
        }
        return folder if len(roots) == 1 else folder / part.name
    beside = PurePosixPath(target.file).parent
    return beside if len(plan.parts) == 1 else beside / part.name


def _fragment(plan: Plan, part: str) -> dict[str, Any] | None:
    """The ``quantization_config`` of a part, if it is written and not all plain."""
    return config_fragment(
        plan.target_layout,
        (
            ConfiguredModule.of(module, module.outputs)
            for module in plan.modules
            if module.part == part
        ),
    )


def _configured(path: str, kept: Sidecar | None, fragment: dict[str, Any]) -> Sidecar:
    try:
        document = json.loads(kept.content) if kept is not None else {}
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise InvalidInput(
            Problem(
                "bad-config",
                "is no JSON object, and the target's layout writes quantization_config into it",
                hint="Mend it, or take it away: then a new one is written.",
                file=str(kept.origin) if kept is not None else path,
            )
        )
    return Sidecar(
        path, _text(document | {CONFIG_KEY: fragment}), kept.origin if kept is not None else None
    )


def _kept(root: Location) -> list[Location]:
    return [
        file
        for file in sorted(root.iterdir())
        if _matches(file.name, KEPT)
        and not _matches(file.name, NOT_KEPT)
        and file.is_file()
        and file.stat().st_size <= _LARGEST
    ]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _still_true(file: Location) -> bytes:
    content = file.read_bytes()
    if file.name != CONFIG_NAME:
        return content
    try:
        document = json.loads(content)
    except ValueError:
        return content
    if not isinstance(document, dict) or CONFIG_KEY not in document:
        return content
    del document[CONFIG_KEY]
    return _text(document)


def _text(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
