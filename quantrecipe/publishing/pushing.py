"""Onto the Hub: a repository in one commit, of which what is there already is not sent again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from quantrecipe.checkpoint.hub.client import HubFile, api, listing, patiently
from quantrecipe.checkpoint.hub.errors import HubError, endpoint, explaining, transport_errors
from quantrecipe.checkpoint.hub.opening import is_offline
from quantrecipe.checkpoint.hub.repository import HubPath, Repository
from quantrecipe.evaluate.locked import is_below
from quantrecipe.publishing.facts import Gate
from quantrecipe.publishing.publication import Publication, content_of
from quantrecipe.schema.address import SCHEME
from quantrecipe.schema.lock import LOCK_NAME
from quantrecipe.schema.parsed import MAX_LOCK_BYTES
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.provenance import written_paths

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

Notice = Callable[[str], None]

_FIRST: Final = frozenset({".gitattributes"})
"""What a repository holds that nobody has put anything into."""


@dataclass(frozen=True, slots=True)
class Push:
    """What would happen to a repository of the Hub.

    Attributes:
        repo: ``owner/name``.
        parent: the commit that the new one follows; ``None``: it is not there yet.
        private: whether it is made private; ``None``: it stays as it is.
        gated: whether, and how, it is made gated; ``None``: it stays as it is.
        sent: files to send: their bytes.
        kept: files that are there as they shall be.
        deleted: files of an earlier checkpoint that this one has not.
    """

    repo: str
    parent: str | None
    private: bool | None
    gated: Gate | None
    sent: Mapping[str, int]
    kept: tuple[str, ...]
    deleted: tuple[str, ...]

    @property
    def create(self) -> bool:
        """Whether it is not there yet."""
        return self.parent is None

    @property
    def page(self) -> str:
        """Its address in a browser."""
        return f"{endpoint()}/{self.repo}"


def plan_push(
    publication: Publication,
    repo: str,
    *,
    private: bool = False,
    gated: Gate | None = None,
    force: bool = False,
) -> Push:
    """Find out what a push would do; nothing is sent.

    Args:
        publication: what is published.
        repo: ``owner/name``.
        private: whether only its owner may see it.
        gated: whether its files are only for those who accept its terms.
        force: whether files that something else put there may be replaced.

    Raises:
        InvalidInput: there are files of these names, and no lock that says they are a checkpoint.
        HubError: the Hub cannot be asked, or does not know the token.
    """
    place = f"{SCHEME}{repo}"
    _check_token(place, repo)
    sizes = publication.sizes()
    info = _info(repo, place)
    if info is None:
        return Push(repo, None, private, gated, sizes, (), ())
    there = Repository(repo, str(info.sha), endpoint())
    files = listing(there)
    same = {
        path
        for path, size in sizes.items()
        if path in files and size == files[path].size and _is_same(publication, path, files[path])
    }
    sent = {path: size for path, size in sizes.items() if path not in same}
    ours = _earlier(there) if LOCK_NAME in files else None
    taken = sorted(set(sent) & set(files) - _FIRST)
    if ours is None and taken and not force:
        raise InvalidInput(
            Problem(
                "not-a-checkpoint",
                f"holds {', '.join(taken[:3])} already, and no {LOCK_NAME}",
                "Give --force to replace files of these names, or choose another repository.",
                file=place,
            )
        )
    deleted = tuple(sorted(set(ours or ()) & set(files) - set(sizes)))
    return Push(
        repo=repo,
        parent=str(info.sha),
        private=True if private and not info.private else None,
        gated=gated if gated != (info.gated or None) else None,
        sent=sent,
        kept=tuple(sorted(same)),
        deleted=deleted,
    )


def push(
    planned: Push, publication: Publication, *, message: str, notice: Notice = lambda text: None
) -> str:
    """Make the repository what was planned, in one commit.

    Large files are sent first, one by one: what has arrived is not sent again when the same command
    is given after an interruption. Nobody sees any of it before the commit. A repository is gated
    and private before it holds anything.

    Args:
        planned: what to do.
        publication: what is published, written to its folder.
        message: of the commit.
        notice: told of every file that has arrived.

    Returns:
        the SHA of the commit; the one that is there, if nothing has to be done.

    Raises:
        HubError: the Hub does not take it, or the repository has changed meanwhile.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo, place = planned.repo, f"{SCHEME}{planned.repo}"
    hub, folder = api(), publication.facts.folder
    if planned.create:
        patiently(
            lambda: hub.create_repo(repo, private=planned.private or None, exist_ok=True),
            place,
            repo,
        )
    settings: dict[str, Any] = {} if planned.gated is None else {"gated": planned.gated}
    if planned.private and not planned.create:
        settings["private"] = True
    if settings:
        patiently(lambda: hub.update_repo_settings(repo, **settings), place, repo)
    parent = planned.parent
    if parent is None:
        info = _info(repo, place)
        assert info is not None
        parent = str(info.sha)
    if not planned.sent and not planned.deleted:
        return parent
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for path, size in planned.sent.items():
        added = CommitOperationAdd(path, folder / path)
        patiently(partial(_send, hub, repo, added), place, repo)
        notice(f"{path}, {size:,} bytes")
        operations.append(added)
    operations += [CommitOperationDelete(path) for path in planned.deleted]
    with explaining(place, repo):
        done = hub.create_commit(repo, operations, commit_message=message, parent_commit=parent)
    return str(done.oid)


def _send(hub: HfApi, repo: str, added: CommitOperationAdd) -> None:
    """Send a file that is too large for a commit, unless the Hub has its content already."""
    try:
        hub.preupload_lfs_files(repo, [added], free_memory=False)
    except RuntimeError as error:
        # The client says which file, and hides what was the matter behind that.
        if isinstance(error.__cause__, transport_errors()):
            raise error.__cause__ from error
        raise


def _check_token(place: str, repo: str) -> None:
    from huggingface_hub import get_token

    if is_offline():
        message = "cannot be written to, for offline mode is on"
        raise HubError("offline", place, message, "Unset HF_HUB_OFFLINE.")
    if get_token() is None:
        raise HubError(
            "no-token",
            place,
            "nobody can write to it without a token",
            "Get one that may write at "
            f"{endpoint()}/settings/tokens, then 'hf auth login' (or set HF_TOKEN).",
        )
    patiently(lambda: api().whoami(), place, repo)


def _info(repo: str, place: str) -> Any:
    """What the Hub says of a repository; ``None``: there is none, or it is not to be seen."""
    try:
        return patiently(lambda: api().model_info(repo), place, repo)
    except HubError as error:
        if error.kind == "no-repository":
            return None
        raise


def _is_same(publication: Publication, path: str, there: HubFile) -> bool:
    """Whether the Hub has the content of a file; that of large ones is not read for it."""
    lock, folder = publication.facts.lock, publication.facts.folder
    if there.sha256 is not None:
        known = {file.path: file.sha256 for file in (*lock.outputs, *lock.sidecars)}
        if path in known:
            return known[path] == there.sha256
    content = content_of(publication.added.get(path, folder / path))
    if there.sha256 is not None:
        return hashlib.sha256(content).hexdigest() == there.sha256
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return blob.hexdigest() == there.etag


def _earlier(repository: Repository) -> tuple[str, ...]:
    """The files of the checkpoint that is in a repository now; none, if its lock is no lock."""
    lock = HubPath(repository, PurePosixPath(LOCK_NAME))
    if lock.file.size > MAX_LOCK_BYTES:
        return ()
    return tuple(path for path in written_paths(lock.read_bytes()) if is_below(path))
