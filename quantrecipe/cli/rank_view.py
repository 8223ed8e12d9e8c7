"""What a ranking found, for people and for machines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from quantrecipe.cli.tables import human_bytes, table
from quantrecipe.converter.ranking import (
    Basis,
    Curve,
    Fragility,
    Group,
    Ladder,
    Ranking,
    decibels,
)

_SHOWN: Final = 20
_BASES: Final[Mapping[Basis, str]] = {
    "tokens": "measured on kept tokens",
    "moments": "predicted from input moments",
    "weight": "of the weight alone",
}


@dataclass(frozen=True, slots=True)
class Found:
    """All that there is to tell.

    Attributes:
        recipe: its name.
        ranking: of its modules.
        curve: bytes against noise.
        chosen: what to protect.
        ladder: what was measured, if it was.
        out: the recipe that was written, if one was.
    """

    recipe: str
    ranking: Ranking
    curve: Curve
    chosen: tuple[Group, ...]
    ladder: Ladder | None
    out: Path | None

    @property
    def left(self) -> float:
        """The noise-to-signal ratio that the choice leaves."""
        protected = {key for group in self.chosen for key in group.modules}
        return math.fsum(each.noise for each in self.ranking.modules if each.key not in protected)

    @property
    def extra_bytes(self) -> int:
        """What the choice costs."""
        return sum(group.extra_bytes for group in self.chosen)


def ranking_text(found: Found, everything: bool) -> str:
    """Modules, the curve, the choice and the ladder, with long tables cut short."""
    ranking, shown = found.ranking, None if everything else _SHOWN
    bases = Counter(module.basis for module in ranking.modules)
    known = ", ".join(f"{bases[basis]:,} {_BASES[basis]}" for basis in _BASES if basis in bases)
    lines = [
        f"{found.recipe}: {_count(len(ranking.modules), 'quantized module')}, noise {known}",
        *_modules(found, shown),
        "",
        *_curve(found, shown),
    ]
    if found.ladder is not None:
        lines += ["", *_ladder(found.ladder)]
    lines += ["", _choice(found)]
    if found.out is not None:
        lines.append(str(found.out))
    return "\n".join(lines)


def warnings(ranking: Ranking) -> Iterator[str]:
    """What makes a ranking worth less than it looks."""
    blind = [module for module in ranking.modules if module.blind]
    if blind:
        names = ", ".join(f"{part}: {name}" for part, name in (each.key for each in blind[:3]))
        more = f" and {len(blind) - 3:,} more" if len(blind) > 3 else ""
        yield (
            f"activations are quantized, and what that costs is not known of "
            f"{_count(len(blind), 'module')}: {names}{more}"
        )


def _modules(found: Found, shown: int | None) -> list[str]:
    protected = {key for group in found.chosen for key in group.modules}
    modules = found.ranking.modules
    rows = [
        (
            place,
            module.part,
            module.name,
            _db(module.noise),
            _db(module.weight_noise),
            "" if module.activation_share is None else f"{module.activation_share:.0%}",
            *_spikes(module),
            "" if module.worst_bin is None else _db(module.worst_bin.noise),
            human_bytes(module.extra_bytes),
            "protect" if module.key in protected else "",
        )
        for place, module in enumerate(modules[:shown], start=1)
    ]
    headers = (
        *("#", "part", "module", "SQNR dB", "weight dB", "by inputs", "max/median", "kurtosis"),
        *("worst bin dB", "bytes", ""),
    )
    return [*table(rows, headers, "rllrrrrrrrl").splitlines(), *_more(len(modules), len(rows))]


def _spikes(module: Fragility) -> tuple[str, str]:
    if module.spikiness is None:
        return "", ""
    kurtosis = module.spikiness.kurtosis
    return f"{module.spikiness.max_to_median:.3g}", "" if kurtosis is None else f"{kurtosis:.3g}"


def _curve(found: Found, shown: int | None) -> list[str]:
    curve, knee = found.curve, found.curve.knee()
    points = _spread(len(curve), shown, knee)
    rows = [
        (
            human_bytes(curve.nbytes[point]),
            len(curve.chosen(point)),
            f"{curve.noise[point]:.3g}",
            _db(curve.noise[point]),
            "knee" if point == knee else "",
        )
        for point in points
    ]
    headers = ("bytes", "protected", "noise / signal", "SQNR dB", "")
    title = f"least noise for the bytes, {_count(len(curve), 'choice')}"
    if not curve.exact:
        title += f" (to {human_bytes(curve.slack_bytes)})"
    return [f"{title}:", *table(rows, headers, "rrrrl").splitlines(), *_more(len(curve), len(rows))]


def _spread(count: int, shown: int | None, knee: int) -> Sequence[int]:
    """Places spread evenly, with both ends and the knee among them."""
    if shown is None or count <= shown:
        return range(count)
    return sorted({knee, *(round(step * (count - 1) / (shown - 2)) for step in range(shown - 1))})


def _ladder(ladder: Ladder) -> list[str]:
    rows = [
        (
            rung.order,
            rung.protected,
            rung.modules,
            human_bytes(rung.extra_bytes),
            f"{rung.value:.6g}",
            "knee" if rung.order == "ranked" and rung.protected == ladder.knee else "",
        )
        for rung in ladder.rungs
    ]
    headers = ("first", "protected", "modules", "bytes", "value", "")
    return ["converted and measured:", *table(rows, headers, "lrrrrl").splitlines()]


def _choice(found: Found) -> str:
    groups, modules = len(found.chosen), sum(len(group.modules) for group in found.chosen)
    together = "" if groups == modules else f" in {_count(groups, 'group')}"
    return (
        f"protect {_count(modules, 'module')}{together} in {found.ranking.dtype}: "
        f"{human_bytes(found.extra_bytes)} more, SQNR over all modules "
        f"{_db(found.ranking.noise)} -> {_db(found.left)} dB"
    )


def ranking_json(found: Found) -> dict[str, Any]:
    """The same for machines, with nothing left out; noise is a ratio of powers."""
    ladder = found.ladder
    return {
        "recipe": found.recipe,
        "dtype": found.ranking.dtype,
        "noise": found.ranking.noise,
        "modules": [_module_json(module) for module in found.ranking.modules],
        "groups": [_group_json(group) for group in found.ranking.groups],
        "warnings": list(warnings(found.ranking)),
        "curve": {
            "bytes": list(found.curve.nbytes),
            "noise": list(found.curve.noise),
            "protected": [len(found.curve.chosen(point)) for point in range(len(found.curve))],
            "knee": found.curve.knee(),
            "exact": found.curve.exact,
            "slack_bytes": found.curve.slack_bytes,
        },
        "chosen": {
            "groups": [_group_json(group) for group in found.chosen],
            "extra_bytes": found.extra_bytes,
            "noise": found.left,
            "sqnr_db": decibels(found.left),
        },
        "ladder": None if ladder is None else asdict(ladder),
        "out": None if found.out is None else str(found.out),
    }


def _module_json(module: Fragility) -> dict[str, Any]:
    value = asdict(module) | {"sqnr_db": decibels(module.noise)}
    if module.spikiness is not None and not math.isfinite(module.spikiness.max_to_median):
        value["spikiness"]["max_to_median"] = None
    return value


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "modules": [{"part": part, "name": name} for part, name in group.modules],
        "noise": group.noise,
        "extra_bytes": group.extra_bytes,
    }


def _more(count: int, shown: int) -> list[str]:
    return [f"... of {count:,} (--all shows all)"] if shown < count else []


def _db(noise: float) -> str:
    value = decibels(noise)
    return "exact" if value is None else f"{value:.1f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
