"""The sections on modules: the map of the network, and weight SQNR by depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from quantrecipe.evaluate.reporting import depth
from quantrecipe.evaluate.reporting.drawing import Drawing
from quantrecipe.evaluate.reporting.markup import Markup, folded, table
from quantrecipe.evaluate.reporting.modules import Module, Network, names
from quantrecipe.evaluate.reporting.network import (
    Cell,
    Heats,
    heats,
    layers_maps,
    legend,
    modules_list,
)
from quantrecipe.evaluate.reporting.places import Place
from quantrecipe.evaluate.reporting.sections import Figure, Section, paragraph
from quantrecipe.evaluate.reporting.wording import count, decibels, stored_as

MOST_PANELS: Final = 24
_MANY_REASONS: Final = 8


def map_figure(
    found: Network, name: str, title: str, cell: Callable[[Module], Cell], key: Drawing
) -> Figure:
    """Maps of all parts, what is outside of layers, and the legend."""
    maps, beside = list[tuple[Drawing, ...]](), list[Drawing]()
    several = len(found.parts) > 1
    for part in found.parts:
        mine = found.of(part)
        for stack in found.stacks(part):
            cells: Mapping[Place, Cell] = {
                module.place: cell(module)
                for module in mine
                if module.place is not None and module.place.stack == stack
            }
            maps += [(each,) for each in layers_maps(f"{part}: {stack}", cells)]
        alone = {module.locked.name: cell(module) for module in mine if module.place is None}
        if alone:
            where = f"{part}: " if several or not found.stacks(part) else ""
            which = "outside of layers" if found.stacks(part) else "modules"
            beside.append(modules_list(f"{where}{which}", alone))
    caption = "A row for each layer, a column for each kind of module. Point at a cell to read it."
    return Figure(name, title, (*maps, *([tuple(beside)] if beside else [])), caption, key)


def network_section(found: Network) -> Section:
    """The map coloured by weight SQNR, and every module in a table."""
    scale = heats(module.sqnr_db for module in found.modules if module.measured)
    plain = sorted({m.short for m in found.modules if m.locked.disposition == "passthrough"})
    key = legend(
        scale,
        "weight SQNR, dB",
        kept=bool(found.reasons),
        plain=plain[0] if plain else None,
    )
    title = "Modules by weight SQNR"
    figure = map_figure(found, "network", title, lambda module: _cell(module, scale), key)
    content: list[object] = [
        paragraph(_lead(found)),
        figure.markup(),
        *_reasons(found),
        folded(f"Every module in a table ({len(found.modules):,})", _every(found)),
    ]
    return Section("network", "The network", tuple(content), (figure,))


def _lead(found: Network) -> str:
    dispositions = [module.locked.disposition for module in found.modules]
    pieces = [
        f"{dispositions.count(each):,} {name}"
        for each, name in (
            ("quantized", "quantized"),
            ("protected", "protected"),
            ("passthrough", "passed through"),
        )
        if each in dispositions
    ]
    return f"{count(len(found.modules), 'module')}: {', '.join(pieces)}."


def _cell(module: Module, scale: Heats) -> Cell:
    if module.measured:
        text = decibels(module.sqnr_db)
        return Cell(text, scale.of(module.sqnr_db), False, module.title)
    return Cell(module.short, None, bool(module.tag), module.title)


def _reasons(found: Network) -> list[Markup]:
    if not found.reasons:
        return []
    rows = [(tag, len(modules), reason, names(modules)) for tag, reason, modules in found.reasons]
    listed = table(
        ("tag", "modules", "why protected", "which"), rows, "lrww", "Protected on purpose"
    )
    if len(rows) > _MANY_REASONS:
        return [folded(f"Why modules are protected ({len(rows):,} reasons)", listed)]
    return [listed]


def _every(found: Network) -> Markup:
    def order(module: Module) -> tuple[bool, float]:
        return not module.measured, float("inf") if module.sqnr_db is None else module.sqnr_db

    rows = [
        (
            module.locked.name,
            module.locked.part,
            f"{module.locked.shape[0]:,} x {module.locked.shape[1]:,}",
            stored_as(module.locked.weight),
            module.locked.transfer,
            decibels(module.sqnr_db) if module.measured else "",
            "" if module.locked.error is None else f"{module.locked.error.max_error_in_scales:.3f}",
            f"{module.tag} {module.locked.reason}" if module.tag else module.locked.scheme or "",
        )
        for module in sorted(found.modules, key=order)
    ]
    headers = (
        *("module", "part", "out x in", "stored as", "transfer", "weight SQNR, dB"),
        *("largest error, scales", "scheme, or why protected"),
    )
    return table(headers, rows, "llrllrrw", "The lowest SQNR first")


def depth_section(found: Network) -> Section | None:
    """Weight SQNR over layers for each kind of module, if there are layers and any noise."""
    points: dict[str, list[depth.Point]] = {}
    stacks = {stack for part in found.parts for stack in found.stacks(part)}
    rows = {
        stack: {
            index: row
            for row, index in enumerate(
                sorted({m.place.index for m in found.modules if m.place and m.place.stack == stack})
            )
        }
        for stack in stacks
    }
    for module in found.modules:
        place = module.place
        if place is None:
            continue
        kind = place.title if len(stacks) == 1 else f"{place.stack}: {place.title}"
        points.setdefault(kind, []).append(
            depth.Point(
                module.locked.part,
                rows[place.stack][place.index],
                place.layer,
                module.sqnr_db if module.measured else None,
                bool(module.tag),
                module.title,
            )
        )
    lowest = {
        kind: min((p.sqnr_db for p in mine if p.sqnr_db is not None), default=None)
        for kind, mine in points.items()
    }
    noisy = sorted((value, kind) for kind, value in lowest.items() if value is not None)
    if not noisy:
        return None
    shown = {kind: points[kind] for _, kind in noisy[:MOST_PANELS]}
    caption = "All panels have the same axes. Layers that are left out are protected, or exact."
    if len(noisy) > MOST_PANELS:
        caption += f" Shown are the {MOST_PANELS} of {len(noisy)} kinds with the lowest SQNR."
    drawings, key = depth.panels(shown, found.parts), depth.key(found.parts)
    figure = Figure.of("depth", "Weight SQNR by layer, in dB", drawings, caption, key)
    lead = paragraph(
        "Signal to quantization noise of each weight, in dB, over the layers: 6 dB are one bit."
    )
    return Section("depth", "Weight SQNR by depth", (lead, figure.markup()), (figure,))
