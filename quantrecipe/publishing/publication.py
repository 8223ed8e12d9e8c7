"""A repository as it is to be, and how it is written beside the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quantrecipe.checkpoint import OutputExists, Staging, locate
from quantrecipe.checkpoint.durable import output_error
from quantrecipe.checkpoint.errors import SourceError
from quantrecipe.publishing.facts import Facts, License
from quantrecipe.schema.address import HubAddress


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a user says of a publication.

    Attributes:
        base: the repository that the weights were made from, where the lock does not say so.
        pipeline: the repository of the pipeline they belong to, if that is another.
        license: the licence, in place of what the base's card says.
        usage: a script of the user's own.
        evaluations, scores: what was measured, and what from.
        variant: what the checkpoint is called there.
        statistics: the statistics that the recipe smooths by.
        benchmarks: speeds.
        repo: where it goes on the Hub.
    """

    base: HubAddress | None = None
    pipeline: HubAddress | None = None
    license: License | None = None
    usage: Path | None = None
    evaluations: Sequence[Path] = ()
    scores: Sequence[Path] = ()
    variant: str | None = None
    statistics: Sequence[Path] = ()
    benchmarks: Path | None = None
    repo: str | None = None


@dataclass(frozen=True, slots=True)
class Publication:
    """A repository, before it is written.

    Attributes:
        facts: what its card says.
        added: what goes beside the files of the checkpoint, by path: bytes, or a file to copy.
        checkpoint: the files of the checkpoint, lock included, by path: sizes in bytes.
        warnings: what a user should know.
    """

    facts: Facts
    added: Mapping[str, bytes | Path]
    checkpoint: Mapping[str, int]
    warnings: tuple[str, ...] = field(default=())

    def sizes(self) -> dict[str, int]:
        """Every file with its bytes, by path."""
        added = {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in self.added.items()
        }
        return dict(sorted({**self.checkpoint, **added}.items()))

    def changed(self) -> dict[str, bool]:
        """The added files that are not in the folder as they shall be: whether one is replaced."""
        found: dict[str, bool] = {}
        for path, content in self.added.items():
            there = self.facts.folder / path
            if not there.is_file():
                found[path] = False
            elif there.read_bytes() != content_of(content):
                found[path] = True
        return found


def write(publication: Publication, *, force: bool) -> tuple[str, ...]:
    """Put what is added beside the checkpoint; every file appears when it is whole.

    Returns:
        the paths that were written; what was there already is left alone.

    Raises:
        OutputExists: files of these names are there, with other content, and ``force`` is not
            given.
        OutputError: the system could not write.
    """
    changed = publication.changed()
    replaced = [path for path, there in changed.items() if there]
    folder = publication.facts.folder
    if replaced and not force:
        raise OutputExists(folder, replaced)
    if not changed:
        return ()
    with Staging(folder, "published") as staging:
        staging.clear()
        for path in changed:
            target = locate(staging.folder, path)
            content = content_of(publication.added[path])
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            except OSError as error:
                raise output_error(target, error, len(content)) from error
        staging.publish(force=True)
    return tuple(changed)


def content_of(content: bytes | Path) -> bytes:
    """The bytes of a file that is added.

    Raises:
        SourceError: the system could not read it.
    """
    if isinstance(content, bytes):
        return content
    try:
        return content.read_bytes()
    except OSError as error:
        raise SourceError(content, error) from error
