"""Small files beside the source that still hold for the output, and are kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Final

from quantrecipe.schema.plan import Plan
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
        origin: the file of the source that it was made from.
    """

    path: str
    content: bytes
    origin: Path


def find_sidecars(plan: Plan) -> tuple[Sidecar, ...]:
    """What is kept from beside each part, and where it goes.

    Beside the part's own file where it has one, else below a folder of the part's name, else (a
    single part) into the output folder itself. Parts from different folders never share one: there,
    too, each gets a folder of its name. ``quantization_config`` is taken out of a ``config.json``:
    it describes how the source was quantized.
    """
    found: dict[str, Sidecar] = {}
    for part in plan.parts:
        folder = _folder_of(plan, part)
        for file in _kept(part.root):
            path = str(folder / file.name)
            found[path] = Sidecar(path, _still_true(file), file)
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


def _kept(root: Path) -> list[Path]:
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


def _still_true(file: Path) -> bytes:
    content = file.read_bytes()
    if file.name != "config.json":
        return content
    try:
        document = json.loads(content)
    except ValueError:
        return content
    if not isinstance(document, dict) or "quantization_config" not in document:
        return content
    del document["quantization_config"]
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
