"""From what a user calls a source to the folder or file that it is, here or on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from quantrecipe.checkpoint.hub.client import resolve
from quantrecipe.checkpoint.hub.errors import HubError, endpoint
from quantrecipe.checkpoint.hub.repository import HubPath, Repository
from quantrecipe.schema.address import HubAddress
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import SourceRepository
from quantrecipe.schema.problems import InvalidInput

_MISSING: Final = frozenset({"missing-part", "missing-shard", "missing-source", "no-safetensors"})


@dataclass(frozen=True, slots=True)
class OpenedAddress:
    """What an address stands for.

    Attributes:
        root: the folder or file.
        repository: where it is from, with the commit that its revision stood for.
    """

    root: Location
    repository: SourceRepository


def open_address(address: HubAddress, *, offline: bool = False) -> OpenedAddress:
    """Find out what an address stands for; the commit stays the same from here on.

    Args:
        address: where.
        offline: whether the Hub must not be asked, as ``HF_HUB_OFFLINE`` says it: then it is what
            the Hub's cache holds.

    Raises:
        InvalidInput: there is no such repository or revision.
        HubError: the Hub cannot be asked, or offline, and nothing of it is in the cache.
    """
    if offline or is_offline():
        folder = _cached(address)
        commit, root = folder.name, folder.joinpath(address.below)
        return OpenedAddress(root, SourceRepository.of(address, commit))
    commit = resolve(address.repo, address.revision)
    repository = Repository(address.repo, commit, endpoint())
    return OpenedAddress(
        HubPath(repository, PurePosixPath(address.below)), SourceRepository.of(address, commit)
    )


@contextmanager
def in_cache_only(repository: SourceRepository | None, root: Location) -> Iterator[None]:
    """Within it, what is missing below ``root`` is missing in the cache, and can be fetched."""
    try:
        yield
    except InvalidInput as error:
        if repository is None or not isinstance(root, Path):
            raise
        hint = "It is not in the Hub's cache, and offline mode is on: fetch it with 'quantrecipe "
        raise InvalidInput(
            replace(problem, hint=f"{hint}pull'.") if problem.kind in _MISSING else problem
            for problem in error.problems
        ) from error


def is_offline() -> bool:
    """Whether the environment says that the Hub must not be asked."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def nearest(location: Location) -> Location:
    """The same file in the Hub's cache, where that has it; else itself."""
    if isinstance(location, HubPath):
        return location.at_hand() or location
    return location


def _cached(address: HubAddress) -> Path:
    """The folder of the cache that holds what was fetched of a revision."""
    from huggingface_hub import constants

    name = "models--" + address.repo.replace("/", "--")
    folder = Path(constants.HF_HUB_CACHE) / name
    revision = address.revision or constants.DEFAULT_REVISION
    snapshot = folder / "snapshots" / revision
    with suppress(OSError):
        snapshot = folder / "snapshots" / (folder / "refs" / revision).read_text("utf-8").strip()
    if not snapshot.is_dir():
        raise HubError(
            "offline",
            str(address),
            "is not in the Hub's cache on this machine, and offline mode is on",
            "Fetch it with 'quantrecipe pull' first, while there is a connection.",
        )
    return snapshot
