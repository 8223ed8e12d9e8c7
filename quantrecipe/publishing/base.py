"""The repository that a checkpoint was made from, as the Hub and its own model card describe it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from quantrecipe.checkpoint.hub.client import api, patiently
from quantrecipe.checkpoint.hub.errors import endpoint
from quantrecipe.checkpoint.hub.opening import open_address
from quantrecipe.checkpoint.hub.repository import HubPath
from quantrecipe.publishing.facts import Base, Gate, License
from quantrecipe.schema.address import HubAddress
from quantrecipe.schema.location import Location
from quantrecipe.schema.lock import Lock
from quantrecipe.schema.problems import InvalidInput, Problem

CARD_NAME: Final = "README.md"
_LICENSES: Final = ("LICENSE*", "LICENCE*", "NOTICE*")
_LARGEST_LICENSE: Final = 1 << 20
_LARGEST_CARD: Final = 4 << 20
_URL: Final = re.compile(r"https?://\S+")


@dataclass(frozen=True, slots=True)
class OpenedBase:
    """A base repository.

    Attributes:
        base: what is said of it.
        root: its root, at the commit.
        commit: the one that was looked at.
    """

    base: Base
    root: Location
    commit: str

    def licenses(self) -> Mapping[str, bytes]:
        """The licence and notice files at its root, by name.

        Raises:
            HubError: the Hub does not give them.
        """
        return {file.name: file.read_bytes() for file in _license_files(self.root)}


def base_address(lock: Lock, given: HubAddress | None) -> tuple[HubAddress, bool] | None:
    """Which repository a checkpoint was made from, and whether it is known to be that commit.

    Args:
        lock: of the checkpoint.
        given: what the user says; it must not contradict the lock.

    Raises:
        InvalidInput: it does.
    """
    read_from = lock.repository
    if read_from is not None:
        if given is not None and given.repo != read_from.repo:
            raise InvalidInput(
                Problem(
                    "another-base",
                    f"the lock says that the weights were read from {read_from.repo}",
                    "Leave --base out.",
                    file=str(given),
                )
            )
        return HubAddress(read_from.repo, read_from.commit), True
    if given is not None:
        return given, False
    source = lock.recipe.source
    return None if source.repo is None else (HubAddress(source.repo, source.revision), False)


def open_base(address: HubAddress, *, converted: bool) -> OpenedBase:
    """Ask the Hub about a repository; offline, the Hub's cache.

    Args:
        address: which, and which revision of it.
        converted: whether it is known that just this commit was converted.

    Raises:
        InvalidInput: there is no such repository, or its card is malformed.
        HubError: the Hub cannot be asked, or the cache does not have it.
    """
    opened = open_address(address)
    commit = opened.repository.commit
    gated: Gate | None = None
    if isinstance(opened.root, HubPath):
        info = patiently(
            lambda: api().model_info(address.repo, revision=commit), str(address), address.repo
        )
        card = {} if info.card_data is None else _values(info.card_data)
        gated = info.gated or None
    else:
        card = _card_of(opened.root / CARD_NAME, str(address))
    page = f"{endpoint()}/{address.repo}"
    base = Base(
        repo=address.repo,
        commit=commit if converted else None,
        license=_license(card, page, commit, opened.root),
        page=page,
        pipeline_tag=_text(card, "pipeline_tag"),
        library_name=_text(card, "library_name"),
        languages=_texts(card, "language"),
        tags=_texts(card, "tags"),
        gated=gated,
        gate={key: value for key, value in card.items() if key.startswith("extra_gated_")},
    )
    return OpenedBase(base, opened.root, commit)


def _card_of(file: Location, place: str) -> dict[str, Any]:
    """The front matter of a card that lies in the Hub's cache."""
    if not isinstance(file, Path) or not file.is_file() or file.stat().st_size > _LARGEST_CARD:
        return {}
    import yaml
    from huggingface_hub import ModelCard

    try:
        content = file.read_text("utf-8")
        return _values(ModelCard(content, ignore_metadata_errors=True).data)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        message = f"{CARD_NAME} is no model card: {error}"
        hint = "Say which licence holds with --license."
        raise InvalidInput(Problem("bad-card", message, hint, file=place)) from error


def _values(data: Any) -> dict[str, Any]:
    return dict(data.to_dict())


def _license(card: Mapping[str, Any], page: str, commit: str, root: Location) -> License | None:
    """What a card says of the licence; a link into the repository leads there, or to the copy."""
    found = _texts(card, "license")
    if len(found) != 1:
        return None  # None, or a choice, which only a person can make.
    link = _text(card, "license_link")
    if link is not None and _URL.fullmatch(link) is None:
        link = link.removeprefix("./")
        if link not in {file.name for file in _license_files(root)}:
            link = f"{page}/blob/{commit}/{link}"
    return License(found[0], _text(card, "license_name"), link)


def _license_files(root: Location) -> Iterator[Location]:
    for file in root.iterdir():
        if (
            any(fnmatchcase(file.name.upper(), pattern) for pattern in _LICENSES)
            and file.is_file()
            and file.stat().st_size <= _LARGEST_LICENSE
        ):
            yield file


def _text(card: Mapping[str, Any], key: str) -> str | None:
    value = card.get(key)
    return value if isinstance(value, str) and value.strip() else None


def _texts(card: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = card.get(key)
    several = value if isinstance(value, list) else [value]
    return tuple(each for each in several if isinstance(each, str) and each.strip())
