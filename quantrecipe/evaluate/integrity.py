"""The files of a converted checkpoint, held to their lock; every byte is read once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantrecipe.checkpoint import SourceError, digests, read_header
from quantrecipe.evaluate.locked import is_below, rewritten
from quantrecipe.evaluate.records import Progress
from quantrecipe.schema.canonical import document_bytes, recipe_digest
from quantrecipe.schema.lock import Lock, LockedTensor, OutputFile
from quantrecipe.schema.placement import shard_of
from quantrecipe.schema.plan_metadata import METADATA_KEY, recipe_metadata
from quantrecipe.schema.problems import InvalidInput, Problem, closest
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.tensors import SourceFileInfo, TensorInfo
from quantrecipe.schema.validation import load_recipe

RECIPE_NAME: Final = "recipe.json"
_SUFFIX: Final = ".safetensors"
_INDEX_SUFFIX: Final = ".safetensors.index.json"
_AGAIN: Final = "Fetch the file again, or convert again."


def check_files(folder: Path, lock: Lock, *, quick: bool, progress: Progress) -> list[Problem]:
    """Hold every file of a converted checkpoint to its lock.

    Args:
        folder: what the lock lies in.
        lock: what it says.
        quick: headers and sizes only.
        progress: told of each file that was read; files are read at the same time.

    Raises:
        SourceError: a file is there and cannot be read.
    """
    tensors: dict[str, dict[str, LockedTensor]] = {output.path: {} for output in lock.outputs}
    for _, tensor in lock.tensors():
        tensors.setdefault(tensor.file, {})[tensor.name] = tensor
    says = recipe_metadata(lock.recipe, lock.recipe_sha256)[METADATA_KEY]
    files = [
        _OutputCheck(folder, output, tensors[output.path], says, lock.recipe_sha256, quick)
        for output in lock.outputs
        if is_below(output.path)
    ]
    problems: list[Problem] = []
    # Two threads hash one file: its own digest and those of its tensors.
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for output, found in zip(lock.outputs, pool.map(_OutputCheck.run, files), strict=False):
            problems += found
            if not quick:
                progress(output.bytes, output.path)
    problems += _check_recipe(folder / RECIPE_NAME, lock)
    problems += _check_indexes(folder, lock)
    problems += _check_extra(folder, lock)
    return problems


@dataclass(frozen=True, slots=True)
class _OutputCheck:
    """One output file, and what the lock says of it."""

    folder: Path
    output: OutputFile
    tensors: Mapping[str, LockedTensor]
    metadata: str
    recipe_sha256: str
    quick: bool

    @property
    def path(self) -> Path:
        return self.folder.joinpath(*self.output.path.split("/"))

    def run(self) -> list[Problem]:
        path = self.path
        if not path.exists():
            return [self._problem("missing-file", "the lock vouches for it", _AGAIN)]
        problems: list[Problem] = []
        try:
            header = read_header(path)
        except InvalidInput as error:
            problems += error.problems
        else:
            problems += self._check_header(header)
        if path.is_file() and path.stat().st_size != self.output.bytes:
            message = f"has {path.stat().st_size:,} bytes, not {self.output.bytes:,}"
            problems.append(self._problem("wrong-size", message, _AGAIN))
        if path.is_file() and not self.quick:
            problems += self._check_digests(path.stat().st_size)
        return problems

    def _check_header(self, header: SourceFileInfo) -> Iterator[Problem]:
        for tensor in self.tensors.values():
            yield from self._check_tensor(tensor, header)
        for name in header.tensors.keys() - self.tensors.keys():
            yield self._problem("extra-tensor", "the lock does not know it", None, name)
        said = header.metadata.get(METADATA_KEY)
        if said != self.metadata:
            yield self._problem("metadata-mismatch", self._what_metadata(said), _AGAIN)

    def _check_tensor(self, tensor: LockedTensor, header: SourceFileInfo) -> Iterator[Problem]:
        info: TensorInfo | None = header.tensors.get(tensor.name)
        if info is None:
            near = closest(tensor.name, header.tensors)
            hint = f"There is {near!r}." if near is not None else _AGAIN
            yield self._problem("missing-tensor", "the lock vouches for it", hint, tensor.name)
            return
        for kind, found, wanted in (
            ("mistyped-tensor", info.dtype, tensor.dtype),
            ("misshaped-tensor", list(info.shape), list(tensor.shape)),
            ("misplaced-tensor", f"at byte {info.offset}", f"at byte {tensor.offset}"),
            ("missized-tensor", f"{info.nbytes} bytes", f"{tensor.bytes} bytes"),
        ):
            if found != wanted:
                message = f"is {found}, and the lock says {wanted}"
                yield self._problem(kind, message, None, tensor.name)

    def _what_metadata(self, said: str | None) -> str:
        entry = f"its metadata entry {METADATA_KEY!r}"
        if said is None:
            return f"{entry} is missing"
        try:
            digest = json.loads(said)["recipe_sha256"]
        except (ValueError, KeyError, TypeError):
            return f"{entry} holds no recipe with a digest"
        if digest != self.recipe_sha256:
            return f"{entry} is of another recipe than the lock ({digest})"
        return f"{entry} is not what its recipe makes it"

    def _check_digests(self, size: int) -> Iterator[Problem]:
        ranges = dict(_readable(self.tensors.values(), size))
        try:
            whole, each = digests(self.path, ranges)
        except ValueError:  # it was as long as that a moment ago
            yield self._problem("source-changed", "became shorter while it was read", _AGAIN)
            return
        damaged = [name for name, digest in each.items() if digest != self.tensors[name].sha256]
        for name in damaged:
            yield self._problem("digest-mismatch", "its bytes are not those written", _AGAIN, name)
        if whole != self.output.sha256:
            message = (
                f"its bytes are not those written: {len(damaged)} tensor(s) differ"
                if damaged
                else "no tensor differs, so its header does, or the digest in the lock"
            )
            yield self._problem("digest-mismatch", message, _AGAIN)

    def _problem(
        self, kind: str, message: str, hint: str | None, tensor: str | None = None
    ) -> Problem:
        return Problem(kind, message, hint, file=str(self.path), tensor=tensor)


def _readable(tensors: Iterable[LockedTensor], size: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The ranges that can be hashed in one pass; what is wrong with the others has been said."""
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.bytes)):
        end = tensor.offset + tensor.bytes
        if position <= tensor.offset and end <= size:
            yield tensor.name, (tensor.offset, tensor.bytes)
            position = end


def _check_recipe(file: Path, lock: Lock) -> Iterator[Problem]:
    """The recipe beside the lock is the one in it."""
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        yield Problem("missing-file", "the recipe is not beside its lock", _AGAIN, file=str(file))
        return
    except OSError as error:
        raise SourceError(file, error) from error
    if text == document_bytes(lock.recipe.to_json_value()):
        return
    try:
        recipe: Recipe = load_recipe(file)
    except InvalidInput as error:
        yield from error.problems
        return
    if recipe_digest(recipe) == lock.recipe_sha256:
        yield rewritten(file)
        return
    hint = "One of the two was edited or is of another conversion."
    yield Problem("recipe-differs", "is not the recipe of the lock", hint, file=str(file))


def _check_indexes(folder: Path, lock: Lock) -> Iterator[Problem]:
    """The index of shards says where the lock's tensors are."""
    for path, expected in _indexes(lock).items():
        file = folder.joinpath(*path.split("/"))
        try:
            found = json.loads(file.read_bytes())
        except FileNotFoundError:
            yield Problem("missing-file", "the shards have no index", _AGAIN, file=str(file))
        except OSError as error:
            raise SourceError(file, error) from error
        except (ValueError, RecursionError):
            yield Problem("bad-index", "is not an index", _AGAIN, file=str(file))
        else:
            if found != expected:
                yield Problem("bad-index", _index_fault(found, expected), _AGAIN, file=str(file))


def _indexes(lock: Lock) -> dict[str, object]:
    """The index of every set of shards, as the lock's tensors make it, by path."""
    maps: dict[str, dict[str, str]] = {}
    sizes: dict[str, int] = {}
    for _, tensor in lock.tensors():
        home = shard_of(tensor.file)
        if home is None or not is_below(tensor.file):
            continue
        path = home.removesuffix(_SUFFIX) + _INDEX_SUFFIX
        maps.setdefault(path, {})[tensor.name] = tensor.file.rpartition("/")[2]
        sizes[path] = sizes.get(path, 0) + tensor.bytes
    return {
        path: {"metadata": {"total_size": sizes[path]}, "weight_map": weight_map}
        for path, weight_map in maps.items()
    }


def _index_fault(found: object, expected: object) -> str:
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


def _check_extra(folder: Path, lock: Lock) -> Iterator[Problem]:
    """Whoever opens the folder would take other weights in it for a part of the checkpoint."""
    known = {output.path for output in lock.outputs} | _indexes(lock).keys()
    for scheme in lock.recipe.schemes.values():
        if scheme.smoothing is not None:
            known.add(scheme.smoothing.statistics)
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            relative = Path(parent, name).relative_to(folder).as_posix()
            if name.endswith((_SUFFIX, _INDEX_SUFFIX)) and relative not in known:
                yield Problem(
                    "extra-file",
                    "the lock does not know it",
                    "Move it elsewhere, or fetch the lock that goes with it.",
                    file=str(Path(parent, name)),
                )
