"""What is known of a checkpoint that is to be published; the model card says nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantrecipe.evaluate.reporting.timed import Timed
from quantrecipe.schema.evaluated import Evaluated
from quantrecipe.schema.lock import Lock

Gate = Literal["auto", "manual"]
"""Who may read a gated repository: whoever accepts its terms, or whom its owner lets in."""


@dataclass(frozen=True, slots=True)
class License:
    """Under which terms weights may be used.

    Attributes:
        identifier: as the Hub spells it: ``apache-2.0``; ``other`` where it has no word for it.
        name: what an ``other`` one is called.
        link: where it is to be read: a URL, or the path of a file in the published repository.
    """

    identifier: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True, slots=True)
class Base:
    """The repository that the weights were made from, as its own model card describes it.

    Attributes:
        repo: ``owner/name``.
        commit: the commit that was converted; ``None`` if that is not known, since the source was a
            folder.
        license: of its weights; ``None`` if it states none.
        pipeline_tag, library_name: the Hub's words for what it does, and what runs it.
        languages, tags: likewise.
        gated: whether, and how, it is only for those who have accepted its terms.
        gate: what those who ask are told and asked: the ``extra_gated_*`` entries of its card.
        page: its address in a browser.
    """

    repo: str
    commit: str | None
    license: License | None
    page: str
    pipeline_tag: str | None = None
    library_name: str | None = None
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    gated: Gate | None = None
    gate: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Needed:
    """What else has to be fetched before the checkpoint runs: other components of its pipeline.

    Attributes:
        repo, commit: where it is.
        gated: whether that asks for terms to be accepted.
        files: their sizes in bytes, by path.
    """

    repo: str
    commit: str
    gated: bool
    files: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Usage:
    """How the published checkpoint is run.

    Attributes:
        script: the text of ``usage.py``.
        packages: what it needs, as pip calls it.
        command: an example of running it, one line of shell.
        summary: what that does, a sentence.
        needed: what ``download_deps.py`` fetches; ``None``: the checkpoint is enough.
        example: lines of Python that do it from another program, in the same folder.
    """

    script: bytes
    packages: tuple[str, ...]
    command: str
    summary: str
    needed: Needed | None = None
    example: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """An evaluation, and how it was come by.

    Attributes:
        evaluated: what was found.
        variant: what this checkpoint is called in it.
        path: of the evaluation's file in the repository.
        sha256: digest of that file.
        scores: paths in the repository of the score files that it was computed from, in the order
            of its ``inputs``; ``None`` for those that are not published.
    """

    evaluated: Evaluated
    variant: str
    path: str
    sha256: str
    scores: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """All of it.

    Attributes:
        lock: of the converted checkpoint.
        folder: where that lies.
        base: what it was made from; ``None``: nobody said.
        license: the licence that it is published under.
        usage: how it is run.
        results: evaluations.
        timed: measured speeds.
        loader: whether ``safetensors_loader.py`` is there.
        repo: where it goes on the Hub, ``owner/name``; ``None`` if that is not known.
    """

    lock: Lock
    folder: Path
    base: Base | None
    license: License
    usage: Usage
    results: tuple[Result, ...] = ()
    timed: Timed | None = None
    loader: bool = True
    repo: str | None = None
