"""Fetching what a recipe needs of a repository into the Hub's cache, or into a folder."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath

from quantrecipe.checkpoint.durable import output_error
from quantrecipe.checkpoint.folder import look_into
from quantrecipe.checkpoint.hub.client import api, resolve
from quantrecipe.checkpoint.hub.components import beside, component, pipeline_locations
from quantrecipe.checkpoint.hub.errors import endpoint, explaining
from quantrecipe.checkpoint.hub.opening import (
    OpenedAddress,
    in_cache_only,
    is_offline,
    open_address,
)
from quantrecipe.checkpoint.hub.repository import HubPath, Repository
from quantrecipe.checkpoint.source import open_parts
from quantrecipe.schema.address import HubAddress
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import SourceRepository
from quantrecipe.schema.problems import InvalidInput, OutputError, Problem, did_you_mean


@dataclass(frozen=True, slots=True)
class PulledFile:
    """A file that is needed.

    Attributes:
        path: below the repository's root, with ``/``.
        size: in bytes.
        there: whether it is on this machine already.
    """

    path: str
    size: int
    there: bool


@dataclass(frozen=True, slots=True)
class Pull:
    """What is needed of a repository.

    Attributes:
        repository: which, and which commit of it.
        files: by their paths.
        notes: what a user should know.
        offline: whether all of it has to be here.
        folder: where to put it; ``None``: into the Hub's cache.
    """

    repository: SourceRepository
    files: tuple[PulledFile, ...]
    notes: tuple[str, ...]
    offline: bool
    folder: Path | None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes of those that are not here."""
        return sum(file.size for file in self.files if not file.there)


def plan_pull(
    address: HubAddress,
    parts: Mapping[str, str] | None,
    *,
    names: Sequence[str] = (),
    pipeline: bool = False,
    offline: bool = False,
    folder: Path | None = None,
) -> Pull:
    """Find out what is needed; of the weights, only the headers are read.

    Args:
        address: the repository, and where the parts are in it.
        parts: a recipe's part names to their locations; ``None``: all weights there are.
        names: which of the parts, or, without a recipe, which folders; none: all.
        pipeline: whether the other components of a pipeline are needed, too.
        offline: whether the Hub must not be asked.
        folder: where to put it; ``None``: into the Hub's cache.

    Raises:
        InvalidInput: there is no such repository, revision or part, or a part is malformed.
        HubError: the repository cannot be read.
    """
    offline = offline or is_offline()
    opened = open_address(address, offline=True) if offline else _pinned(address)
    root, notes = opened.root, list[str]()
    with in_cache_only(opened.repository, root):
        found = set(_of_parts(root, _chosen(parts, names, root)))
        if pipeline:
            found |= set(pipeline_locations(root, notes))
    base = root
    for _ in PurePosixPath(address.below).parts:
        base = base.parent
    files = tuple(
        PulledFile(path, file.stat().st_size, _is_there(file, path, folder))
        for file in sorted(found)
        for path in [file.relative_to(base).as_posix()]
    )
    return Pull(opened.repository, files, tuple(notes), offline, folder)


def pull(planned: Pull) -> Path:
    """Fetch what was planned; what is here is not fetched again, not even half of a file.

    Returns:
        The folder that stands for the repository's root.

    Raises:
        HubError: the Hub does not give a file.
        OutputError: there is no room for it, or the system cannot write it.
    """
    from huggingface_hub import constants, snapshot_download

    target = planned.folder or Path(constants.HF_HUB_CACHE)
    repo, commit = planned.repository.repo, planned.repository.commit
    if not planned.offline:
        _check_room(target, planned.missing)
    try:
        with explaining(f"hf://{repo}@{commit}", repo):
            return Path(
                snapshot_download(
                    repo,
                    revision=commit,
                    allow_patterns=[escape(file.path) for file in planned.files],
                    local_dir=planned.folder,
                    local_files_only=planned.offline,
                    endpoint=endpoint(),
                )
            )
    except OSError as error:
        if error.errno in (None, errno.ENOENT):
            raise
        raise output_error(target, error, planned.missing) from error


def _pinned(address: HubAddress) -> OpenedAddress:
    """As ``open_address``; and the cache notes which commit the revision stood for."""
    resolve(address.repo, address.revision)
    place = f"hf://{address.repo}"
    with explaining(place, address.repo):
        commit = api().resolve_revision(address.repo, revision=address.revision).resolved
    root = HubPath(Repository(address.repo, commit, endpoint()), PurePosixPath(address.below))
    return OpenedAddress(root, SourceRepository.of(address, commit))


def _chosen(
    parts: Mapping[str, str] | None, names: Sequence[str], root: Location
) -> Mapping[str, str]:
    """Part names to locations, of those parts that are wanted."""
    if parts is None:
        if names:
            return {name: name for name in names}
        return {str(place): str(place) for place in _places(root)}
    for name in names:
        if name not in parts:
            raise InvalidInput(
                Problem(
                    "unknown-part",
                    f"the recipe has no part {name!r}",
                    did_you_mean(name, list(parts)),
                )
            )
    return {name: parts[name] for name in names or parts}


def _places(root: Location) -> Iterator[str]:
    """Where below a folder there are weights: the folder itself, or folders in it."""
    if not root.is_dir():
        yield "."
        return
    found = look_into(root)
    if found.files or found.indexes:
        yield "."
    yield from found.parts


def _of_parts(root: Location, parts: Mapping[str, str]) -> Iterator[Location]:
    for location in parts.values():
        folder = root if location == "." else root / location
        if folder.is_dir() and _ambiguous(folder):
            yield from component(folder, [])
            continue
        (part,) = open_parts(root, {"part": location})
        base = root.parent if root.is_file() else root
        yield from (base.joinpath(file.relative) for file in part.files)
        yield from beside(part.root)


def _ambiguous(folder: Location) -> bool:
    """Whether a folder leaves it open which of its files are meant: then all plain ones are."""
    found = look_into(folder)
    return len(found.indexes) > 1 or (not found.indexes and len(found.files) > 1)


def _is_there(file: Location, path: str, folder: Path | None) -> bool:
    if isinstance(file, Path):
        return True
    assert isinstance(file, HubPath)
    if folder is None:
        return file.at_hand() is not None
    there = folder / path
    return there.is_file() and there.stat().st_size == file.file.size


def _check_room(folder: Path, needed: int) -> None:
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OutputError(
            f"{folder}: the disk is full: {needed:,} bytes are needed, and {free:,} are free\n"
            "  Make room, or choose another folder with --out (or HF_HOME, for the cache)."
        )
