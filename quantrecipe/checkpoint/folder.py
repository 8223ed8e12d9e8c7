"""What lies in a folder, as far as it matters to somebody who looks for a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from quantrecipe.checkpoint.errors import some
from quantrecipe.checkpoint.foreign import ONLY_SAFETENSORS
from quantrecipe.schema.location import Location
from quantrecipe.schema.problems import closest

SUFFIX: Final = ".safetensors"
GGUF_SUFFIX: Final = ".gguf"
SUFFIXES: Final = (SUFFIX, GGUF_SUFFIX)
"""What files of weights are called that are read."""

INDEX_SUFFIX: Final = ".safetensors.index.json"
_FOREIGN: Final = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".onnx", ".h5", ".msgpack", ".npz"}
)


@dataclass(frozen=True, slots=True)
class Found:
    """The names in a folder, sorted.

    Attributes:
        indexes: files that say in which shard each tensor lies.
        files: safetensors and GGUF files.
        foreign: weights in containers that are not read.
        parts: folders right below that hold safetensors files or an index.
        others: everything else.
    """

    indexes: tuple[str, ...]
    files: tuple[str, ...]
    foreign: tuple[str, ...]
    parts: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def instead(self) -> str:
        """What there is, for the end of a sentence that says what there is not."""
        if self.parts:
            return f", but {some(f'{part}/' for part in self.parts)} below it do"
        if self.foreign:
            return f", only {some(self.foreign)}"
        return f", only {some(self.others)}" if self.others else "; it is empty"

    def hint(self, prefix: str) -> str | None:
        """What to do; ``prefix`` leads from the source's root here, with a final ``/``."""
        if self.parts:
            parts = ", ".join(f'"{_part_name(part)}": "{prefix}{part}"' for part in self.parts[:8])
            return f"It looks like a pipeline: name its parts, source.parts: {{{parts}}}."
        if self.foreign:
            return f"{ONLY_SAFETENSORS} Save the weights as safetensors first."
        return None


def look_into(folder: Location) -> Found:
    """List a folder.

    Raises:
        OSError: it cannot be listed.
    """
    indexes: list[str] = []
    files: list[str] = []
    foreign: list[str] = []
    parts: list[str] = []
    others: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            (parts if _has_weights(path) else others).append(path.name)
        elif path.name.endswith(INDEX_SUFFIX):
            indexes.append(path.name)
        elif path.name.endswith(SUFFIXES):
            files.append(path.name)
        elif path.suffix.lower() in _FOREIGN:
            foreign.append(path.name)
        else:
            others.append(path.name)
    return Found(tuple(indexes), tuple(files), tuple(foreign), tuple(parts), tuple(others))


def near_miss(path: Location) -> str | None:
    """A hint for a path that is not there: what is called almost so, or what is there instead."""
    missing, parent = path.name, path.parent
    while not parent.is_dir():
        if parent == parent.parent:
            return None
        missing, parent = parent.name, parent.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir())
    except OSError:
        return None
    near = closest(missing, names)
    if near is not None:
        return f"Did you mean {near!r}?"
    return f"In {parent}: {some(names)}." if names else f"{parent} is empty."


def _has_weights(folder: Location) -> bool:
    try:
        return any(path.name.endswith((*SUFFIXES, INDEX_SUFFIX)) for path in folder.iterdir())
    except OSError:
        return False


def _part_name(folder: str) -> str:
    kept = "".join(letter if letter.isalnum() else "_" for letter in folder.lower())
    return kept if kept[:1].isalpha() else f"part_{kept}"
