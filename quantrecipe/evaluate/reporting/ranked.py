"""What ``quantrecipe rank --json`` found, read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from quantrecipe.evaluate.reporting.fields import Fields, Source, read_fields

Key = tuple[str, str]
"""Part and module."""

_Read = TypeVar("_Read")

_ORDERS: Final = ("ranked", "random", "reverse")
_WHAT: Final = "what `quantrecipe rank --json` prints"


@dataclass(frozen=True, slots=True)
class RankedModule:
    """A module and its noise.

    Attributes:
        key: part and name.
        sqnr_db: of its output, or of its weight where ``basis`` is that; ``None``: no noise.
        basis: ``tokens``, ``moments`` or ``weight``.
        max_to_median: of its inputs, where they were measured.
        worst_bin: the timesteps where it is noisiest, if that is known.
        extra_bytes: what protecting it adds.
    """

    key: Key
    sqnr_db: float | None
    basis: str
    max_to_median: float | None
    worst_bin: tuple[float, float] | None
    extra_bytes: int


@dataclass(frozen=True, slots=True)
class Rung:
    """A conversion that was measured."""

    order: str
    protected: int
    modules: int
    extra_bytes: int
    value: float


@dataclass(frozen=True, slots=True)
class Ranked:
    """A ranking.

    Attributes:
        source: the file.
        recipe: the name of the recipe that was ranked.
        dtype: what protected modules would be kept in.
        modules: the noisiest first.
        nbytes, noise, protected: the curve: bytes added, noise to signal left, groups protected.
        knee: a point of it.
        chosen: what was chosen to be protected.
        chosen_bytes, chosen_noise: what that adds, and leaves.
        chosen_groups: how many groups that are.
        rungs: the ladder, in the order of the file; empty without one.
        ladder_knee: how many groups are protected at the knee of its ranked order.
        warnings: what makes it worth less.
    """

    source: Source
    recipe: str
    dtype: str
    modules: tuple[RankedModule, ...]
    nbytes: tuple[float, ...]
    noise: tuple[float, ...]
    protected: tuple[float, ...]
    knee: int
    chosen: frozenset[Key]
    chosen_bytes: int
    chosen_noise: float
    chosen_groups: int
    rungs: tuple[Rung, ...]
    ladder_knee: int | None
    warnings: tuple[str, ...]


def read_ranked(path: Path) -> Ranked:
    """Read a ranking.

    Raises:
        InvalidInput: it is none.
        SourceError: the system could not read it.
    """
    found, source = read_fields(path, _WHAT)
    curve, chosen = found["curve"], found["chosen"]
    nbytes, noise = curve["bytes"].numbers(), curve["noise"].numbers()
    protected, knee = curve["protected"].numbers(), curve["knee"].whole()
    if not len(nbytes) == len(noise) == len(protected) or not 0 <= knee < len(nbytes):
        raise curve.refused("its lists differ in length, or the knee is none of its points")
    groups = list(chosen["groups"].items())
    ladder = found.get("ladder")
    return Ranked(
        source=source,
        recipe=found["recipe"].text(),
        dtype=found["dtype"].text(),
        modules=tuple(_module(each) for each in found["modules"].items()),
        nbytes=nbytes,
        noise=noise,
        protected=protected,
        knee=knee,
        chosen=frozenset(_key(each) for group in groups for each in group["modules"].items()),
        chosen_bytes=chosen["extra_bytes"].whole(),
        chosen_noise=chosen["noise"].number(),
        chosen_groups=len(groups),
        rungs=() if ladder is None else tuple(_rung(each) for each in ladder["rungs"].items()),
        ladder_knee=None if ladder is None else ladder["knee"].whole(),
        warnings=tuple(each.text() for each in found["warnings"].items()),
    )


def _key(found: Fields) -> Key:
    return found["part"].text(), found["name"].text()


def _module(found: Fields) -> RankedModule:
    return RankedModule(
        key=_key(found),
        sqnr_db=_optional(found, "sqnr_db", Fields.number),
        basis=found["basis"].text(),
        max_to_median=_optional(found, "spikiness", _max_to_median),
        worst_bin=_optional(found, "worst_bin", _timesteps),
        extra_bytes=found["extra_bytes"].whole(),
    )


def _optional(found: Fields, key: str, read: Callable[[Fields], _Read]) -> _Read | None:
    inner = found.get(key)
    return None if inner is None else read(inner)


def _max_to_median(found: Fields) -> float | None:
    return _optional(found, "max_to_median", Fields.number)


def _timesteps(found: Fields) -> tuple[float, float]:
    return found["start"].number(), found["stop"].number()


def _rung(found: Fields) -> Rung:
    order = found["order"].text()
    if order not in _ORDERS:
        raise found["order"].refused(f"{order!r} is none of {', '.join(_ORDERS)}")
    return Rung(
        order=order,
        protected=found["protected"].whole(),
        modules=found["modules"].whole(),
        extra_bytes=found["extra_bytes"].whole(),
        value=found["value"].number(),
    )
