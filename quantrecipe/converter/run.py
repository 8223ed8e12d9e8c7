"""The main job: plan, check, stage, convert, hold to the bounds, lock, publish."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from quantrecipe.checkpoint import OutputWriter, Staging, check_destination, digests
from quantrecipe.checkpoint.durable import output_error
from quantrecipe.converter.checking import check_bounds, check_complete, finish
from quantrecipe.converter.locking import Digests, make_lock
from quantrecipe.converter.planning import RecipeLike, open_recipe, plan
from quantrecipe.converter.protocol import (
    DEFAULT_BLOCK_BYTES,
    Converter,
    Job,
    Progress,
    silent,
)
from quantrecipe.converter.selection import find_converter
from quantrecipe.converter.sidecars import Sidecar, find_sidecars
from quantrecipe.converter.workers import available_cores
from quantrecipe.schema.canonical import document_bytes
from quantrecipe.schema.lock import LOCK_NAME, Lock, OutputFile
from quantrecipe.schema.placement import shard_of
from quantrecipe.schema.plan import Plan
from quantrecipe.schema.problems import OutputError

RECIPE_NAME = "recipe.json"


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was done.

    Attributes:
        out: the folder that holds the result.
        lock: what was written, with digests and errors.
        source_bytes, output_bytes: bytes of tensors read; bytes of files written.
        seconds: from the first byte read to the folder published.
    """

    out: Path
    lock: Lock
    source_bytes: int
    output_bytes: int
    seconds: float


def convert(
    recipe: RecipeLike,
    source: Path | str | None,
    out: Path | str,
    *,
    converter: str = "streaming",
    block_bytes: int = DEFAULT_BLOCK_BYTES,
    jobs: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Convert a checkpoint as a recipe says, into a folder that appears only when it is whole.

    Args:
        recipe: a ``Recipe``, or the path or built-in name of one.
        source: the root of the source, or one safetensors file; ``None``: where the recipe says.
        out: the output folder.
        converter: the name of whoever carries it out.
        block_bytes: about how many bytes of numbers to hold at a time; it never changes a byte.
        jobs: threads to work with; ``None``: as many as there are cores. It never changes a byte.
        force: whether files of the same names in ``out`` are replaced.
        progress: called with bytes done and the module's name.

    Raises:
        InvalidInput: the recipe, the source or a bound does not hold; nothing is published.
        OutputError: the output cannot be written.
    """
    loaded = open_recipe(recipe)
    with loaded.locating():
        return carry_out(
            plan(loaded, source, converter=converter),
            find_converter(converter),
            Path(out),
            block_bytes=block_bytes,
            jobs=jobs,
            force=force,
            progress=progress,
        )


def carry_out(
    planned: Plan,
    converter: Converter,
    out: Path,
    *,
    block_bytes: int = DEFAULT_BLOCK_BYTES,
    jobs: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Carry out a plan. See ``convert``."""
    if block_bytes < 1:
        raise ValueError(f"block_bytes is {block_bytes}, but at least one byte must be held")
    workers = available_cores() if jobs is None else jobs
    if workers < 1:
        raise ValueError(f"{workers} jobs do no work")
    started = time.monotonic()
    sidecars = find_sidecars(planned)
    paths = _output_paths(planned, sidecars)
    kept = _read_from(planned, sidecars)
    _keep_source(kept, out, paths)
    check_destination(out, paths, force)
    stale = [path for path in _paths_of_old_lock(out) if (out / path).resolve() not in kept]
    with Staging(out) as staging:
        with OutputWriter(planned.files, staging.folder) as output:
            job = Job(planned, output, block_bytes, progress, workers)
            results = tuple(converter.convert(job))
            check_complete(planned, results, converter)
            check_bounds(planned, results)
            finish(output, converter)
        small = {sidecar.path: sidecar.content for sidecar in sidecars} | {**planned.extra_files}
        small[RECIPE_NAME] = document_bytes(planned.recipe.to_json_value())
        for path, content in small.items():
            _put(staging.folder, path, content)
        outputs, tensors = _digests(planned, staging.folder)
        lock = make_lock(planned, converter, results, tensors, outputs, small)
        _put(staging.folder, LOCK_NAME, document_bytes(lock.to_json_value()))
        staging.publish(force=force, lock=LOCK_NAME, order=paths, stale=stale)
    return Conversion(
        out, lock, planned.source_bytes, planned.output_bytes, time.monotonic() - started
    )


def _digests(planned: Plan, folder: Path) -> tuple[tuple[OutputFile, ...], Digests]:
    """Digests of what lies on the disk, not of what was meant to be written."""
    outputs: list[OutputFile] = []
    tensors: dict[tuple[str, str], str] = {}
    for file in planned.files:
        ranges = {
            name: (file.offsets[name], tensor.nbytes) for name, tensor in file.tensors.items()
        }
        whole, each = digests(folder.joinpath(*file.path.split("/")), ranges)
        outputs.append(OutputFile(path=file.path, bytes=file.size, sha256=whole))
        tensors.update(((file.path, name), digest) for name, digest in each.items())
    return tuple(outputs), tensors


def _put(folder: Path, path: str, content: bytes) -> None:
    target = folder.joinpath(*path.split("/"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    except OSError as error:
        raise output_error(target, error, len(content)) from error


def _output_paths(planned: Plan, sidecars: tuple[Sidecar, ...]) -> tuple[str, ...]:
    """In the order in which they may be replaced: what vouches for the rest comes last."""
    return (
        *(file.path for file in planned.files),
        *(sidecar.path for sidecar in sidecars),
        *planned.extra_files,
        RECIPE_NAME,
        LOCK_NAME,
    )


def _read_from(planned: Plan, sidecars: tuple[Sidecar, ...]) -> frozenset[Path]:
    """Every file that the output is made of, symlinks resolved."""
    files = [file.path for file in planned.source_files]
    files += [sidecar.origin for sidecar in sidecars]
    if planned.statistics is not None:
        files.append(planned.statistics)
    return frozenset(file.resolve() for file in files)


def _keep_source(kept: frozenset[Path], out: Path, paths: tuple[str, ...]) -> None:
    """The source is never what gets replaced, not even with force."""
    for path in paths:
        if (out / path).resolve() in kept:
            raise OutputError(
                f"{out / path}: belongs to the source, which is never replaced\n"
                "  Choose another output folder."
            )


def _paths_of_old_lock(out: Path) -> tuple[str, ...]:
    """Files that an earlier conversion into the same folder wrote, the index of shards included."""
    try:
        document = json.loads((out / LOCK_NAME).read_text("utf-8"))
        paths = [str(entry["path"]) for entry in document["outputs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    indexes = {f"{whole}.index.json" for whole in map(shard_of, paths) if whole is not None}
    return (*paths, *sorted(indexes))
