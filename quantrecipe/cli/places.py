"""What commands take for the place of a checkpoint: a path, or a repository of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantrecipe.schema.address import is_address

if TYPE_CHECKING:
    from quantrecipe.schema.location import Location


class Place(click.Path):
    """A path; not the empty one, which would stand for the working folder.

    Args:
        repositories: whether ``hf://…`` is fine too, and stays the text that it is.
    """

    def __init__(self, *, repositories: bool = False) -> None:
        super().__init__(path_type=Path)
        self.repositories = repositories

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty (a variable that is not set?); '.' is the working folder.")
        if self.repositories and is_address(value):
            return value
        return super().convert(value, param, ctx)


def open_place(place: Path | str, *, offline: bool = False) -> Location:
    """Where a checkpoint is: the path, or the file or folder of a repository.

    Args:
        place: as ``Place`` gives it.
        offline: whether a repository is read from the Hub's cache only.

    Raises:
        InvalidInput: there is no such repository or revision.
        HubError: the Hub cannot be asked.
    """
    if isinstance(place, Path):
        return place
    from quantrecipe.checkpoint.hub.opening import open_address
    from quantrecipe.schema.address import parse_address

    return open_address(parse_address(place), offline=offline).root


def place_of(root: Location, place: Path | str) -> Path | str:
    """What names ``root``, which was found at ``place``, to whoever opens it again."""
    from quantrecipe.checkpoint.hub.repository import HubPath
    from quantrecipe.schema.address import HubAddress, parse_address

    if isinstance(root, HubPath):
        address = parse_address(str(place))
        return str(HubAddress(address.repo, address.revision, str(root.path)))
    assert isinstance(root, Path)
    return root
