"""The modules of a lock as the report shows them: places, titles, tags of reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from quantrecipe.evaluate.reporting.places import Place, places
from quantrecipe.evaluate.reporting.wording import decibels, stored_as
from quantrecipe.schema.lock import Lock, LockedModule
from quantrecipe.schema.name_groups import collapse, natural

Key = tuple[str, str]
"""Part and module."""

_SHORT: Final = MappingProxyType(
    {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
)


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the lock.

    Attributes:
        locked: what the lock says of it.
        place: where it is among the layers; ``None`` outside of them.
        tag: of the reason that it is protected for; ``""`` if it is not.
    """

    locked: LockedModule
    place: Place | None
    tag: str

    @property
    def key(self) -> Key:
        """Part and module."""
        return self.locked.part, self.locked.name

    @property
    def measured(self) -> bool:
        """Whether it was quantized, so that its weight has an SQNR, finite or not."""
        return self.locked.disposition == "quantized"

    @property
    def sqnr_db(self) -> float | None:
        """Of its weight; ``None``: nothing was rounded."""
        return None if self.locked.error is None else self.locked.error.sqnr_db

    @property
    def short(self) -> str:
        """What stands on the map if it is not quantized."""
        return self.tag or _SHORT.get(self.locked.weight.format, self.locked.weight.format)

    @property
    def title(self) -> str:
        """All that is known of it, on one line."""
        locked = self.locked
        pieces = [
            f"{locked.part}: {locked.name}",
            f"{stored_as(locked.weight)}, {locked.shape[0]} x {locked.shape[1]}",
        ]
        if locked.scheme is not None:
            pieces.append(f"scheme {locked.scheme}")
        if locked.error is not None:
            known = decibels(locked.error.sqnr_db)
            pieces.append(
                f"weight SQNR {known}{'' if known == 'exact' else ' dB'}, largest error "
                f"{locked.error.max_error_in_scales:.3g} scales"
            )
        if locked.disposition != "quantized":
            pieces.append(locked.disposition)
        if locked.reason is not None:
            pieces.append(locked.reason)
        return " · ".join(pieces)


@dataclass(frozen=True, slots=True)
class Network:
    """All modules.

    Attributes:
        modules: in the order of parts, stacks, layers and names.
        parts: their parts, sorted.
        reasons: why modules are protected: tag, reason and modules.
    """

    modules: tuple[Module, ...]
    parts: tuple[str, ...]
    reasons: tuple[tuple[str, str, tuple[Module, ...]], ...]

    def of(self, part: str) -> tuple[Module, ...]:
        """The modules of a part."""
        return tuple(module for module in self.modules if module.locked.part == part)

    def stacks(self, part: str) -> tuple[str, ...]:
        """The stacks of layers of a part."""
        found = {module.place.stack for module in self.of(part) if module.place is not None}
        return tuple(sorted(found, key=natural))


def network(lock: Lock) -> Network:
    """The modules of a lock, each with its place and tag."""
    parts = tuple(sorted({module.part for module in lock.modules}))
    found = {
        part: places(module.name for module in lock.modules if module.part == part)
        for part in parts
    }
    ordered = sorted(lock.modules, key=lambda module: (module.part, natural(module.name)))
    tags: dict[str, str] = {}
    for locked in ordered:
        if locked.disposition == "protected":
            tags.setdefault(locked.reason or "", f"P{len(tags) + 1}")
    modules = tuple(
        Module(
            locked,
            found[locked.part][locked.name],
            tags[locked.reason or ""] if locked.disposition == "protected" else "",
        )
        for locked in ordered
    )
    reasons = tuple(
        (tag, reason, tuple(module for module in modules if module.tag == tag))
        for reason, tag in tags.items()
    )
    return Network(modules, parts, reasons)


def names(modules: Sequence[Module]) -> str:
    """Modules by the patterns that stand for them, those of each part together."""
    by_part: dict[str, list[str]] = {}
    for module in modules:
        by_part.setdefault(module.locked.part, []).append(module.locked.name)
    by_patterns: dict[str, list[str]] = {}
    for part, found in by_part.items():
        patterns = ", ".join(group.pattern for group in collapse(found))
        by_patterns.setdefault(patterns, []).append(part)
    return "; ".join(f"{', '.join(parts)}: {text}" for text, parts in by_patterns.items())
