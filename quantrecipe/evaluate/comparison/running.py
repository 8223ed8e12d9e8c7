"""Two checkpoints, opened together and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantrecipe.checkpoint.closing import Closing
from quantrecipe.evaluate.comparison.comparing import Outcome, compare_modules, compare_tensors
from quantrecipe.evaluate.comparison.pairing import Pair, pair_parts
from quantrecipe.evaluate.comparison.reading import ModuleRows, StoredTensor
from quantrecipe.evaluate.comparison.records import (
    Compared,
    Diff,
    Kind,
    PairedParts,
    Stored,
)
from quantrecipe.evaluate.comparison.settings import config_differences, metadata_differences
from quantrecipe.evaluate.comparison.sides import OpenedPart, Side, open_side
from quantrecipe.evaluate.comparison.storage import moved_module, moved_tensors
from quantrecipe.evaluate.parallel import on_all_cores
from quantrecipe.evaluate.records import Progress, silent
from quantrecipe.loaders import Checkpoint, OpenPart
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.layout_reading import StoredModule
from quantrecipe.schema.name_groups import natural
from quantrecipe.schema.tensors import TensorInfo

BLOCK_BYTES = 1 << 20
"""About how many bytes of numbers each thread holds of each checkpoint at a time."""

Holding = StoredModule | TensorInfo


@dataclass(frozen=True, slots=True)
class _Task:
    """A module or tensor to be compared: one that both checkpoints have, or only one of them."""

    pair: int
    kind: Kind
    name: str
    a: Holding | None
    b: Holding | None

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.a, self.b) if each is not None)


class Comparison(Closing):
    """Two checkpoints, opened; nothing but headers is read until ``compare``.

    Attributes:
        a, b: the checkpoints.
        nbytes: bytes that ``compare`` will tell its progress of.
    """

    def __init__(self, a: Side, b: Side, pairs: list[Pair]) -> None:
        self.a = a
        self.b = b
        self._pairs = pairs
        self._opened = [(_checkpoint(pair.a), _checkpoint(pair.b)) for pair in pairs]
        self._tasks = [task for index, pair in enumerate(pairs) for task in _tasks(index, pair)]
        self._folders = a.whole and b.whole

    @property
    def nbytes(self) -> int:
        return sum(task.nbytes for task in self._tasks)

    def close(self) -> None:
        """Close all files."""
        for opened in self._opened:
            for checkpoint in opened:
                if checkpoint is not None:
                    checkpoint.close()

    def compare(self, *, block_bytes: int = BLOCK_BYTES, progress: Progress = silent) -> Diff:
        """Compare every module and tensor.

        Raises:
            InvalidInput, SourceError: a file cannot be read, or was changed meanwhile.
        """
        entries = []

        def work(task: _Task) -> Compared:
            return self._compared(task, block_bytes)

        for task, entry in zip(self._tasks, on_all_cores(work, self._tasks), strict=True):
            entries.append(entry)
            progress(task.nbytes, task.name)
        notes = [f"{letter}: {note}" for letter, side in self._sides() for note in side.notes]
        notes += [note for pair in self._pairs for note in pair.notes]
        if not any(pair.a and pair.b for pair in self._pairs):
            notes.append(
                "no part is called the same in both; --part A=B says which belong together"
            )
        return Diff(
            self.a.facts(),
            self.b.facts(),
            tuple(PairedParts(_name(pair.a), _name(pair.b), pair.names_of) for pair in self._pairs),
            tuple(entries),
            tuple(metadata_differences(self.a, self.b)),
            tuple(config_differences(self._pairs, folders=self._folders)),
            tuple(dict.fromkeys(notes)),
        )

    def _sides(self) -> tuple[tuple[str, Side], ...]:
        return ("A", self.a), ("B", self.b)

    def _compared(self, task: _Task, block_bytes: int) -> Compared:
        pair = self._pairs[task.pair]
        a, b = _stored(pair.a, task.a), _stored(pair.b, task.b)
        part = a.part if a is not None else b.part if b is not None else ""
        outcome = self._outcome(task, block_bytes)
        return Compared(
            task.kind,
            part,
            task.name,
            outcome.verdict,
            a,
            b,
            outcome.details,
            outcome.rounding,
            outcome.distance,
        )

    def _outcome(self, task: _Task, block_bytes: int) -> Outcome:
        a, b = task.a, task.b
        if a is None or b is None:
            return Outcome("only-in-b" if a is None else "only-in-a")
        ours, theirs = self._opened[task.pair]
        pair = self._pairs[task.pair]
        assert ours is not None
        assert theirs is not None
        assert pair.a is not None
        assert pair.b is not None
        if isinstance(a, StoredModule) and isinstance(b, StoredModule):
            mine = ModuleRows(ours, pair.a.source.name, a)
            outcome = compare_modules(mine, ModuleRows(theirs, pair.b.source.name, b), block_bytes)
            moved = moved_module(a, b, files=self._folders)
        else:
            assert isinstance(a, TensorInfo)
            assert isinstance(b, TensorInfo)
            outcome = compare_tensors(StoredTensor(ours, a), StoredTensor(theirs, b), block_bytes)
            moved = moved_tensors({"tensor": a}, {"tensor": b}, files=self._folders)
        if outcome.verdict != "same":
            return outcome
        details = tuple(moved)
        return Outcome("moved", details) if details else outcome


def open_comparison(
    a: Path | str,
    b: Path | str,
    *,
    parts: Mapping[str, str] | None = None,
    layout_a: str | Layout | None = None,
    layout_b: str | Layout | None = None,
) -> Comparison:
    """Open two checkpoints and find what belongs together.

    Args:
        a: a safetensors file, an index, a folder with either, or a folder of such folders.
        b: likewise.
        parts: A's name of a part to B's; those that are left out belong together by name.
        layout_a: the layout of ``a``; found out if left out.
        layout_b: that of ``b``.

    Raises:
        InvalidInput: one cannot be opened, or no layout explains it.
        SourceError: a file is there and cannot be read.
    """
    ours, theirs = open_side(Path(a), layout_a), open_side(Path(b), layout_b)
    return Comparison(ours, theirs, pair_parts(ours, theirs, parts or {}))


def _checkpoint(part: OpenedPart | None) -> Checkpoint | None:
    if part is None:
        return None
    contents = OpenPart(part.contents.modules, part.contents.others)
    return Checkpoint(
        files=part.source.files,
        layout=part.layout,
        source_layout=None,
        recipe=None,
        lock=None,
        parts={part.source.name: contents},
        digests={},
    )


def _tasks(index: int, pair: Pair) -> Iterator[_Task]:
    """Modules in the order of their names, then other tensors."""
    ours = pair.a.contents if pair.a is not None else None
    theirs = pair.b.contents if pair.b is not None else None
    held: tuple[tuple[Kind, Mapping[str, Holding], Mapping[str, Holding]], ...] = (
        ("module", ours.modules if ours else {}, theirs.modules if theirs else {}),
        ("tensor", ours.others if ours else {}, theirs.others if theirs else {}),
    )
    for kind, mine, others in held:
        for name in sorted(mine.keys() | others.keys(), key=natural):
            yield _Task(index, kind, name, mine.get(name), others.get(name))


def _name(part: OpenedPart | None) -> str | None:
    return None if part is None else part.source.name


def _stored(part: OpenedPart | None, holding: Holding | None) -> Stored | None:
    if part is None or holding is None:
        return None
    name = part.source.name
    if isinstance(holding, TensorInfo):
        return Stored(name, holding.name, holding.shape, None, {"tensor": holding})
    return Stored(
        name,
        " and ".join(holding.renamed_from) or holding.name,
        (holding.out_features, holding.in_features),
        holding.weight,
        holding.tensors,
    )
