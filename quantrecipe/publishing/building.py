"""All files of a repository that stands on its own, from a converted folder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from quantrecipe.converter.loader_contents import Contents
from quantrecipe.converter.standalone import LOADER_NAME, loader_source, unreadable
from quantrecipe.evaluate import verify
from quantrecipe.evaluate.locked import is_below, read_lock
from quantrecipe.evaluate.reporting.timed import read_timed
from quantrecipe.publishing.base import CARD_NAME, OpenedBase, base_address, open_base
from quantrecipe.publishing.card import model_card
from quantrecipe.publishing.facts import Facts, License
from quantrecipe.publishing.publication import Publication, Wishes
from quantrecipe.publishing.results import read_evidence
from quantrecipe.publishing.running import find_usage, own_usage
from quantrecipe.publishing.scripts import DOWNLOAD_NAME, USAGE_NAME, download_script
from quantrecipe.schema.lock import LOCK_NAME, Lock
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean

NO_LICENSE: Final = (
    "--license says which one holds, in the Hub's words (apache-2.0, ...), or 'other' with "
    "--license-name and --license-link."
)


def prepare(folder: Path, wishes: Wishes) -> Publication:
    """Find out everything that a published checkpoint needs; nothing is written.

    Args:
        folder: what ``convert`` wrote.
        wishes: what the user says.

    Raises:
        InvalidInput: the folder is not whole, the licence is missing, or something that was given
            does not fit.
        SourceError: the system could not read a file.
        HubError: the base repository cannot be asked.
    """
    lock = _whole(folder)
    found = base_address(lock, wishes.base)
    base = None if found is None else open_base(found[0], converted=found[1])
    license_ = _license(wishes.license, base)
    pipeline = base if wishes.pipeline is None else open_base(wishes.pipeline, converted=False)
    checkpoint = _files(lock, folder)
    loader, warnings = _loader(lock)
    standalone = loader is not None or LOADER_NAME in checkpoint
    usage = (
        find_usage(lock, folder, pipeline, standalone=standalone)
        if wishes.usage is None
        else own_usage(wishes.usage)
    )
    evidence = read_evidence(lock, wishes.evaluations, wishes.scores, wishes.variant)
    timed = None if wishes.benchmarks is None else read_timed(wishes.benchmarks)
    added: dict[str, bytes | Path] = {**evidence.files}
    added |= _statistics(lock, folder, wishes.statistics)
    if base is not None:
        licenses = base.licenses().items()
        added |= {name: content for name, content in licenses if name not in checkpoint}
    if loader is not None:
        added[LOADER_NAME] = loader
    added[USAGE_NAME] = usage.script
    if usage.needed is not None:
        added[DOWNLOAD_NAME] = download_script(usage.needed)
    facts = Facts(
        lock=lock,
        folder=folder,
        base=None if base is None else base.base,
        license=license_,
        usage=usage,
        results=evidence.results,
        timed=timed,
        loader=standalone,
        repo=wishes.repo,
    )
    _check_apart(added, checkpoint)
    added[CARD_NAME] = model_card(facts).encode()
    missing = _missing_statistics(lock, added)
    return Publication(facts, dict(sorted(added.items())), checkpoint, (*warnings, *missing))


def _whole(folder: Path) -> Lock:
    """The lock of a folder that has what it vouches for, by names and sizes."""
    opened = read_lock(folder)
    if opened.lock is None or opened.problems:
        raise InvalidInput(opened.problems)
    problems = verify(folder, quick=True).problems
    if problems:
        raise InvalidInput(problems)
    return opened.lock


def _license(given: License | None, base: OpenedBase | None) -> License:
    if given is not None:
        return given
    if base is not None and base.base.license is not None:
        return base.base.license
    where = (
        "nothing says what the weights were made from"
        if base is None
        else (f"the card of {base.base.repo} states none, or several")
    )
    raise InvalidInput(Problem("no-license", f"there is no licence: {where}", NO_LICENSE))


def _loader(lock: Lock) -> tuple[bytes | None, tuple[str, ...]]:
    """The loader beside the checkpoint, where ``convert`` wrote none."""
    if LOADER_NAME in {file.path for file in lock.sidecars}:
        return None, ()
    contents = Contents.of_lock(lock)
    beyond = next(unreadable(contents), None)
    if beyond is None:
        return loader_source(contents), ()
    assert beyond.weight is not None
    message = (
        f"{LOADER_NAME} has no words for {beyond.weight.format}: whoever runs the checkpoint needs "
        "quantrecipe"
    )
    return None, (message,)


def _files(lock: Lock, folder: Path) -> dict[str, int]:
    found = {file.path: file.bytes for file in (*lock.outputs, *lock.sidecars)}
    found[LOCK_NAME] = (folder / LOCK_NAME).stat().st_size
    return dict(sorted(found.items()))


def _check_apart(added: Collection[str], checkpoint: Collection[str]) -> None:
    both = sorted(set(added) & set(checkpoint))
    if both:
        raise InvalidInput(
            Problem(
                "name-conflict",
                f"{', '.join(both)}: the checkpoint has files of these names",
                "Rename what you give.",
            )
        )


def _statistics(lock: Lock, folder: Path, given: Sequence[Path]) -> dict[str, Path]:
    """Statistics under the paths that the recipe calls them by, so that it converts from there."""
    named = {path.rsplit("/", 1)[-1]: path for path in statistics_paths(lock)}
    found = {path: folder / path for path in named.values() if (folder / path).is_file()}
    for path in given:
        if path.name not in named:
            message = "the recipe names no statistics file of this name"
            hint = did_you_mean(path.name, list(named))
            raise InvalidInput(Problem("unknown-statistics", message, hint, file=str(path)))
        found[named[path.name]] = path
    return found


def statistics_paths(lock: Lock) -> tuple[str, ...]:
    """The statistics files that the recipe names, as it names them, below its own folder."""
    return tuple(sorted(path for path in lock.recipe.statistics() if is_below(path)))


def _missing_statistics(lock: Lock, there: Collection[str]) -> tuple[str, ...]:
    return tuple(
        f"the recipe smooths by {path}, which is not published: nobody can convert it again "
        "(--statistics FILE adds it)"
        for path in statistics_paths(lock)
        if path not in there
    )
