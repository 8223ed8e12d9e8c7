"""Evaluating checkpoints: what was written is still there, and as near its source as it must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from quantrecipe.evaluate.agreement import check_lock
from quantrecipe.evaluate.comparison.records import (
    DEFAULT_FAILURES,
    FAILURES,
    Compared,
    Diff,
    Distance,
    Failure,
)
from quantrecipe.evaluate.integrity import check_files
from quantrecipe.evaluate.locked import read_lock
from quantrecipe.evaluate.records import ModuleError, Progress, Verification, silent
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.lock import LOCK_NAME

__all__ = [
    "DEFAULT_FAILURES",
    "FAILURES",
    "Compared",
    "Diff",
    "Distance",
    "Failure",
    "ModuleError",
    "Progress",
    "Verification",
    "diff",
    "verify",
    "workload",
]

BLOCK_BYTES = 256 << 10
"""Small enough that what is computed from a block stays in a core's cache."""


def verify(
    path: Path | str,
    *,
    against: Path | str | None = None,
    quick: bool = False,
    block_bytes: int = BLOCK_BYTES,
    progress: Progress = silent,
) -> Verification:
    """Hold a converted checkpoint to its lock, and to its source.

    Names, dtypes, shapes, offsets, sizes and digests of every tensor and file are those of the
    lock, and the lock is the one that its own digest is of; it is what its recipe makes of these
    modules; recipe, lock, metadata and index say the same. With ``against``, every number is held
    to the source as well: within its format's bound where it was quantized, the exact cast or the
    same bytes where not.

    Args:
        path: the folder that ``convert`` wrote.
        against: the root of the source, or its one safetensors file.
        quick: headers, sizes and small files only; no payload is hashed.
        block_bytes: about how many bytes of float32 numbers ``against`` holds at a time.
        progress: called with bytes finished with.

    Returns:
        Everything that does not hold; nothing is raised for it.

    Raises:
        SourceError: a file is there and cannot be read.
    """
    path, source = Path(path), None if against is None else Path(against)
    opened = read_lock(path)
    lock = opened.lock
    if lock is None:
        return Verification(path, quick, source, None, opened.problems)
    problems = [*opened.problems, *opened.located(check_lock(lock))]
    problems += check_files(path, lock, quick=quick, progress=progress)
    measured: tuple[ModuleError, ...] = ()
    if source is not None:
        # Only this needs torch.
        from quantrecipe.evaluate.against import prove

        proof = prove(path, source, lock, block_bytes=block_bytes, progress=progress)
        problems += proof.problems if not problems else proof.of_numbers
        measured = proof.measured
    return Verification(
        path=path,
        quick=quick,
        against=source,
        recipe=lock.recipe.name,
        problems=tuple(dict.fromkeys(problems)),
        files=len(lock.outputs) + len(lock.sidecars),
        tensors=sum(1 for _ in lock.tensors()),
        modules=len(lock.modules),
        nbytes=sum(file.bytes for file in (*lock.outputs, *lock.sidecars)),
        measured=measured,
    )


def workload(path: Path | str, *, against: bool = False, quick: bool = False) -> int:
    """About how many bytes ``verify`` will tell its ``progress`` of; 0 if the lock is broken."""
    try:
        document = json.loads((Path(path) / LOCK_NAME).read_bytes())
        hashed = 0 if quick else sum(int(output["bytes"]) for output in document["outputs"])
        sources = {entry["path"]: int(entry["bytes"]) for entry in document["source"]}
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return hashed + (sum(sources.values()) if against else 0)


def diff(
    a: Path | str,
    b: Path | str,
    *,
    parts: Mapping[str, str] | None = None,
    layout_a: str | Layout | None = None,
    layout_b: str | Layout | None = None,
    progress: Progress = silent,
) -> Diff:
    """Compare what a reader gets of two checkpoints, in whatever layouts they are.

    Args:
        a: a safetensors file, an index, a folder with either, or a folder of such folders.
        b: likewise.
        parts: A's name of a part to B's; those that are left out belong together by name.
        layout_a: the layout of ``a``; found out if left out.
        layout_b: that of ``b``.
        progress: called with bytes finished with.

    Raises:
        InvalidInput: one cannot be opened, or no layout explains it.
        SourceError: a file is there and cannot be read.
    """
    from quantrecipe.evaluate.comparison.running import open_comparison

    with open_comparison(a, b, parts=parts, layout_a=layout_a, layout_b=layout_b) as opened:
        return opened.compare(progress=progress)
