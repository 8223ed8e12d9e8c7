"""Addresses of repositories: ``hf://owner/name[@revision][/folder/or/file]``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from quantrecipe.schema.base import REPOSITORY, REVISION, SOURCE_PATH
from quantrecipe.schema.problems import InvalidInput, Problem

SCHEME: Final = "hf://"
_FORM: Final = re.compile(
    r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<below>.*))?"
)


@dataclass(frozen=True, slots=True)
class HubAddress:
    """What an address says.

    Attributes:
        repo: ``owner/name``.
        revision: a commit, tag or branch; ``None``: the main branch.
        below: a folder or file of the repository, with ``/``; ``.`` is all of it.
    """

    repo: str
    revision: str | None = None
    below: str = "."

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision.replace('/', '%2F')}"
        return f"{SCHEME}{self.repo}{revision}" + ("" if self.below == "." else f"/{self.below}")


def is_address(text: object) -> bool:
    """Whether a text is meant as an address."""
    return isinstance(text, str) and text.startswith(SCHEME)


def parse_address(text: str) -> HubAddress:
    """Read an address. A ``/`` in a revision is written ``%2F``, but for ``refs/pr/1``.

    Raises:
        InvalidInput: it is none.
    """
    found = _FORM.fullmatch(text.removeprefix(SCHEME))
    if not is_address(text) or found is None:
        raise _bad(text, "is not the address of a repository")
    revision = None if found["revision"] is None else unquote(found["revision"])
    below = (found["below"] or ".").strip("/") or "."
    if re.fullmatch(REPOSITORY, found["repo"]) is None:
        raise _bad(text, f"{found['repo']!r} is no name of a repository")
    if found["repo"].split("/")[0] in ("datasets", "spaces", "buckets"):
        raise _bad(text, "names no repository of a model")
    if revision is not None and re.fullmatch(REVISION, revision) is None:
        raise _bad(text, f"{revision!r} is no revision")
    if re.fullmatch(SOURCE_PATH, below) is None:
        raise _bad(text, f"{below!r} is no place in a repository")
    return HubAddress(found["repo"], revision, below)


def _bad(text: str, message: str) -> InvalidInput:
    form = f"{SCHEME}owner/name, {SCHEME}owner/name@revision or {SCHEME}owner/name@revision/folder."
    return InvalidInput(Problem("bad-address", message, hint=f"Write {form}", file=text))
