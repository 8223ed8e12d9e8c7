"""Everything that a report is made of, read and checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantrecipe.evaluate.locked import read_lock
from quantrecipe.evaluate.reporting.judged import Judged, read_judged
from quantrecipe.evaluate.reporting.measured import Measured, read_measured
from quantrecipe.evaluate.reporting.pictures import Gallery, gallery
from quantrecipe.evaluate.reporting.ranked import Ranked, read_ranked
from quantrecipe.evaluate.reporting.timed import Timed, read_timed
from quantrecipe.schema.lock import Lock
from quantrecipe.schema.problems import InvalidInput, Problem

MOST_IMAGES: Final = 8
IMAGE_SIDE: Final = 320
IMAGE_BYTES: Final = 6_000_000


@dataclass(frozen=True, slots=True)
class Materials:
    """What there is; whatever was not given is not there.

    Attributes:
        lock: of the converted checkpoint.
        ranked: what ``rank`` found.
        judged: what ``evaluate`` found.
        measured: what calibration measured.
        timed: a benchmark.
        gallery: images side by side.
    """

    lock: Lock
    ranked: Ranked | None = None
    judged: tuple[Judged, ...] = ()
    measured: tuple[Measured, ...] = ()
    timed: Timed | None = None
    gallery: Gallery | None = None


def gather(
    folder: Path,
    *,
    rank: Path | None = None,
    evaluations: Sequence[Path] = (),
    statistics: Sequence[Path] = (),
    benchmarks: Path | None = None,
    images: Mapping[str, Path] | None = None,
    most_images: int = MOST_IMAGES,
    image_side: int = IMAGE_SIDE,
    image_bytes: int = IMAGE_BYTES,
) -> Materials:
    """Read all of it.

    Args:
        folder: what ``convert`` wrote.
        rank: what ``rank --json`` printed.
        evaluations: evaluation files.
        statistics: statistics files.
        benchmarks: a benchmark.
        images: folders of images, by what is shown in them.
        most_images: rows of images at most.
        image_side: the longest side of an image, in pixels.
        image_bytes: of all images together, as the page holds them.

    Raises:
        InvalidInput: something does not hold, or belongs to another model.
        SourceError: a file is there and cannot be read.
        QuantrecipeError: images are given, and Pillow is not there.
    """
    opened = read_lock(folder)
    if opened.lock is None or opened.problems:
        raise InvalidInput(opened.problems)
    lock = opened.lock
    ranked = None if rank is None else read_ranked(rank)
    if rank is not None and ranked is not None:
        _check_related(lock, {module.key for module in ranked.modules}, rank, "ranked")
    measured = tuple(read_measured(path) for path in statistics)
    for path, found in zip(statistics, measured, strict=True):
        _check_related(lock, {(each.part, each.name) for each in found.modules}, path, "measured")
    return Materials(
        lock=lock,
        ranked=ranked,
        judged=tuple(read_judged(path) for path in evaluations),
        measured=measured,
        timed=None if benchmarks is None else read_timed(benchmarks),
        gallery=gallery(images, most=most_images, longest=image_side, most_bytes=image_bytes)
        if images
        else None,
    )


def _check_related(lock: Lock, found: set[tuple[str, str]], path: Path, what: str) -> None:
    if found and found.isdisjoint((module.part, module.name) for module in lock.modules):
        raise InvalidInput(
            Problem(
                "another-model",
                f"none of the modules that were {what} is in the lock",
                "Give what was made of this model, with parts and modules called alike.",
                file=str(path),
            )
        )
