"""Asking the Hub: what a revision stands for, what a commit holds, and bytes of its files."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

from quantrecipe.checkpoint.errors import source_changed
from quantrecipe.checkpoint.hub.errors import HubError, endpoint, explained, transport_errors
from quantrecipe.schema.problems import InvalidInput, Problem, closest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from quantrecipe.checkpoint.hub.repository import HubPath, Repository

Result = TypeVar("Result")

_TRY_AGAIN: Final = frozenset({408, 429, 500, 502, 503, 504})
_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_SLICE_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on with a Hub that does not answer as it should.

    Attributes:
        attempts: how many in a row may bring nothing at all.
        first_attempts: the same, of the first question, before anything was got done.
        first_wait, longest_wait: seconds between attempts; each wait is twice the one before.
        longest_told: the most seconds to wait if the Hub says how long.
        silence: seconds without a byte after which a connection counts as lost.
    """

    attempts: int = 8
    first_attempts: int = 3
    first_wait: float = 0.5
    longest_wait: float = 30.0
    longest_told: float = 600.0
    silence: float = 60.0


PATIENCE = Patience()

Check = Callable[[], None]
"""Called while waiting; what it raises ends the wait."""


def unchecked() -> None:
    """A ``Check`` that never ends anything."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a commit.

    Attributes:
        size: in bytes.
        etag: what the Hub calls its content: the SHA-256 of a large file, else git's blob ID.
        sha256: of its content, where the Hub says that.
    """

    size: int
    etag: str
    sha256: str | None


def api() -> HfApi:
    """The client, as the environment wants it."""
    from huggingface_hub import HfApi

    from quantrecipe import __version__

    return HfApi(endpoint=endpoint(), library_name="quantrecipe", library_version=__version__)


def resolve(repo: str, revision: str | None) -> str:
    """The commit that a revision stands for now.

    Raises:
        InvalidInput: there is no such repository or revision.
        HubError: the Hub cannot be asked.
    """
    place = f"hf://{repo}" + ("" if revision is None else f"@{revision}")
    try:
        found = patiently(
            lambda: api().model_info(repo, revision=revision),
            place,
            repo,
            attempts=PATIENCE.first_attempts,
        ).sha
    except HubError as error:
        if error.kind not in ("no-repository", "no-revision"):
            raise
        hint = error.hint
        if error.kind == "no-revision" and (near := _near_revision(repo, str(revision))):
            hint = f"Did you mean {near!r}? {hint}"
        raise InvalidInput(Problem(error.kind, error.message, hint, file=place)) from error
    assert found is not None
    return found


def _near_revision(repo: str, revision: str) -> str | None:
    refs = patiently(lambda: api().list_repo_refs(repo), f"hf://{repo}", repo)
    return closest(revision, [ref.name for ref in (*refs.branches, *refs.tags)])


@lru_cache(maxsize=16)
def listing(repository: Repository) -> Mapping[str, HubFile]:
    """Every file of a commit, by path. A commit never changes: it is asked for once.

    Raises:
        HubError: the Hub cannot be asked.
    """
    from huggingface_hub.hf_api import RepoFile

    def ask() -> dict[str, HubFile]:
        entries = api().list_repo_tree(repository.name, recursive=True, revision=repository.commit)
        return {
            entry.path: HubFile(
                size=entry.size if entry.lfs is None else entry.lfs.size,
                etag=entry.blob_id if entry.lfs is None else entry.lfs.sha256,
                sha256=None if entry.lfs is None else entry.lfs.sha256,
            )
            for entry in entries
            if isinstance(entry, RepoFile) and _is_below(entry.path)
        }

    return patiently(ask, str(repository), repository.name)


def _is_below(path: str) -> bool:
    """Whether a path stays below what it starts from; no honest listing has another one."""
    return not path.startswith("/") and ".." not in path.split("/")


def fetch(path: HubPath, start: int, view: memoryview, check: Check = unchecked) -> None:
    """Fill ``view`` with the bytes of a file from byte ``start`` on, however often it takes.

    What has arrived before a connection is lost is kept, and only the rest asked for again.

    Raises:
        InvalidInput: kind ``source-changed``: the file is not what the listing said.
        HubError: the Hub does not give them.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    from quantrecipe import __version__

    if constants.is_offline_mode():
        from huggingface_hub.errors import OfflineModeIsEnabled

        raise explained(OfflineModeIsEnabled(), str(path), path.repository.name)
    url = hf_hub_url(
        path.repository.name,
        str(path.path),
        revision=path.repository.commit,
        endpoint=endpoint(),
    )
    headers = build_hf_headers(library_name="quantrecipe", library_version=__version__)
    done = 0

    def more() -> None:
        nonlocal done
        with view[done:] as rest:
            for got in _stream(path, url, headers, start + done, rest, check):
                done += got

    patiently(more, str(path), path.repository.name, check, lambda: done)


def _stream(
    path: HubPath, url: str, headers: Mapping[str, str], start: int, view: memoryview, check: Check
) -> Any:
    """Put one answer's bytes into ``view``; yields how many have come, piece by piece."""
    from huggingface_hub import get_session, hf_raise_for_status

    if not view:
        return
    stop = start + len(view)
    wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    done = 0
    with get_session().stream(
        "GET",
        url,
        headers={**headers, **wanted},
        timeout=PATIENCE.silence,
        follow_redirects=True,
    ) as response:
        if response.status_code == 416:
            raise _changed(path, "is shorter than the Hub's own listing says")
        hf_raise_for_status(response)
        _hold_against(path, response, start, stop)
        for piece in response.iter_raw():
            check()
            size = min(len(piece), len(view) - done)
            view[done : done + size] = piece[:size]
            done += size
            yield size
            if done == len(view):
                return
    if done < len(view):
        raise ConnectionError(f"{len(view) - done:,} bytes of {len(view):,} did not come")


def _hold_against(path: HubPath, response: Any, start: int, stop: int) -> None:
    """Whether an answer is of the file that the listing names, and of the range asked for."""
    expected, commit = path.file, path.repository.commit
    for one in (*response.history, response):
        said = one.headers.get("X-Repo-Commit")
        if said is None:
            continue
        if said != commit:
            raise _changed(path, f"is of commit {said} now")
        etag = one.headers.get("X-Linked-Etag") or one.headers.get("ETag") or ""
        etag = etag.removeprefix("W/").strip('"')
        if etag and etag != expected.etag:
            raise _changed(path, f"has the ETag {etag} now, and had {expected.etag}")
    given = _RANGE.fullmatch(response.headers.get("Content-Range") or "")
    if given is None:
        length = response.headers.get("Content-Length")
        if (start, stop) == (0, expected.size) and length == str(expected.size):
            return
        raise HubError(
            "hub-failing",
            str(path),
            "the server does not give ranges of a file",
            "Fetch it with 'quantrecipe pull' first.",
        )
    first, last, size = (int(text) for text in given.groups())
    if size != expected.size:
        raise _changed(path, f"has {size:,} bytes now, and had {expected.size:,}")
    if first != start or last + 1 != stop:
        raise ConnectionError(f"bytes {first} to {last} were sent for {start} to {stop - 1}")


def _changed(path: HubPath, message: str) -> InvalidInput:
    return source_changed(path, message)


def patiently(
    call: Callable[[], Result],
    place: str,
    repo: str,
    check: Check = unchecked,
    progress: Callable[[], int] = lambda: 0,
    attempts: int | None = None,
) -> Result:
    """Call until it works, with longer and longer waits in between.

    Args:
        call: what to do.
        place: what is asked for, as an address.
        repo: the repository.
        check: see there.
        progress: bytes that have come; when there are more of them, patience starts over.
        attempts: as in ``Patience``.

    Raises:
        HubError: it does not work, and would not if tried again; or there is no more patience.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    failed, before, wait = 0, progress(), PATIENCE.first_wait
    while True:
        check()
        try:
            return call()
        except OfflineModeIsEnabled as error:
            raise explained(error, place, repo) from error
        except transport_errors() as error:
            if progress() > before:
                failed, before, wait = 0, progress(), PATIENCE.first_wait
            failed += 1
            told = _told(error)
            hopeless = (
                failed >= (attempts or PATIENCE.attempts) or (told or 0) > PATIENCE.longest_told
            )
            if hopeless or not _may_work(error):
                raise explained(error, place, repo) from error
            _wait(wait if told is None else told, check)
            wait = min(2 * wait, PATIENCE.longest_wait)


def _may_work(error: Exception) -> bool:
    """Whether the same request may be answered otherwise."""
    response = getattr(error, "response", None)
    return response is None or response.status_code in _TRY_AGAIN


def _told(error: Exception) -> float | None:
    """The seconds that the Hub says to wait."""
    response = getattr(error, "response", None)
    if response is None:
        return None
    said = re.search(r"^\s*(\d+)", response.headers.get("Retry-After") or "")
    reset = re.search(r"\bt=(\d+)", response.headers.get("RateLimit") or "")
    if response.status_code == 429 and reset is not None and said is None:
        return float(reset[1])
    return None if said is None else float(said[1])


def _wait(seconds: float, check: Check) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, _SLICE_SECONDS))
