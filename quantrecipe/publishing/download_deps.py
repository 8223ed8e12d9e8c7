# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
"""Fetches what the checkpoint beside this file needs besides. Needs huggingface_hub only.

    python download_deps.py             # into the Hub's cache, where usage.py finds it
    python download_deps.py --out DIR   # or into a folder

Only the files listed below are fetched, of exactly that commit, and none that is here already.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from glob import escape
from pathlib import Path
from typing import cast

from huggingface_hub import constants, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# What is needed: sizes in bytes by path.
# <repository>
REPOSITORY = ""
COMMIT = ""
GATED = False
FILES: dict[str, int] = {}
# </repository>

PAGE = f"{constants.ENDPOINT}/{REPOSITORY}"
# The base of what the Hub's client raises, in whichever HTTP library it is built upon.
TransportError = cast(type[Exception], HfHubHTTPError.__bases__[0])


class FetchError(Exception):
    """Something could not be fetched; the message says why, and what to do about it."""


def fetch(folder: Path | None = None) -> Path:
    """Fetch every file that is not here yet.

    Args:
        folder: where to; None: into the Hub's cache.

    Returns:
        The folder that holds them.

    Raises:
        FetchError: the Hub does not give them, or there is no room for them.
    """
    lacking = missing(folder)
    if folder is not None:
        if not lacking:
            return folder
        for path in lacking:  # not whole, if it is there
            (folder / path).unlink(missing_ok=True)
    check_room(folder or Path(constants.HF_HUB_CACHE), sum(lacking.values()))
    try:
        found = snapshot_download(
            REPOSITORY,
            revision=COMMIT,
            allow_patterns=[escape(path) for path in FILES],
            local_dir=folder,
            local_files_only=not lacking,
        )
    except (TransportError, LocalEntryNotFoundError, OSError) as error:
        raise FetchError(explained(error)) from error
    if broken := missing(folder):
        raise FetchError(
            f"{', '.join(broken)}: not there, or not whole, in {found}. "
            f"If {constants.ENDPOINT} can be reached, delete them and run this again."
        )
    return Path(found)


def missing(folder: Path | None = None) -> dict[str, int]:
    """The files that are not here, or not whole, and their sizes."""
    return {path: size for path, size in FILES.items() if size_of(path, folder) != size}


def size_of(path: str, folder: Path | None) -> int | None:
    """Bytes of a file as far as it is here."""
    if folder is not None:
        found = folder / path
    else:
        cached = try_to_load_from_cache(REPOSITORY, path, revision=COMMIT)
        found = Path(cached if isinstance(cached, str) else "")
    return found.stat().st_size if found.is_file() else None


def check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what would fill the disk."""
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise FetchError(
            f"{needed:,} bytes are needed in {folder}, and {free:,} are free. "
            "Make room, or choose another folder with --out (or HF_HOME, for the cache)."
        )


def explained(error: BaseException) -> str:
    """What went wrong, and what to do about it."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the client looked into its cache then, and tells of that
    login = "" if get_token() else ", then log in with: hf auth login"
    match error:
        case GatedRepoError():
            return f"{REPOSITORY} is gated: accept its terms at {PAGE}{login}"
        case RepositoryNotFoundError():
            return f"there is no repository {PAGE}, or it is private: ask for access{login}"
        case RevisionNotFoundError():
            return f"{PAGE} has no commit {COMMIT}"
        case OfflineModeIsEnabled() | LocalEntryNotFoundError():
            return f"{REPOSITORY} is not in the cache, and HF_HUB_OFFLINE is set: unset it once"
        case HfHubHTTPError():
            return f"{constants.ENDPOINT} refuses: {error.server_message or error}"
        case TransportError():
            return f"{constants.ENDPOINT} cannot be reached: {error}"
        case _:
            return str(error)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fetch what the checkpoint needs besides.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a folder (default: the cache)")
    folder: Path | None = parser.parse_args().out
    lacking = missing(folder)
    print(f"{REPOSITORY}, commit {COMMIT}: {len(FILES)} files, {sum(FILES.values()):,} bytes")
    if GATED and lacking:
        print(f"It is gated: its terms are to be accepted at {PAGE}")
    for path, size in lacking.items():
        print(f"{size:>16,}  {path}")
    try:
        print(fetch(folder))
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
