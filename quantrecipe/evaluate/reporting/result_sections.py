"""The sections on what was measured beside the conversion: ranking, inputs, evaluation, speeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from quantrecipe.evaluate.reporting import forest, speeds, timesteps, tradeoff
from quantrecipe.evaluate.reporting.judged import Judged
from quantrecipe.evaluate.reporting.markup import Markup, element, folded, table
from quantrecipe.evaluate.reporting.measured import Measured
from quantrecipe.evaluate.reporting.modules import Key, Module, Network
from quantrecipe.evaluate.reporting.network import Cell, Heats, heats, legend
from quantrecipe.evaluate.reporting.network_sections import map_figure
from quantrecipe.evaluate.reporting.pictures import Gallery
from quantrecipe.evaluate.reporting.ranked import Ranked, RankedModule
from quantrecipe.evaluate.reporting.sections import Figure, Section, notes, paragraph
from quantrecipe.evaluate.reporting.timed import Timed
from quantrecipe.evaluate.reporting.wording import count, decibels, figure, size
from quantrecipe.schema.evaluated import VERDICTS, Compared, Evaluated, Verdict

MOST_SPIKY: Final = 12
MOST_FRAGILE: Final = 15
_TINY: Final = 64
_BASES: Final = {
    "tokens": "measured on kept tokens",
    "moments": "predicted from input moments",
    "weight": "of the weight alone",
}


def ranking_section(found: Ranked, network: Network, recipe: str) -> Section:
    """Where the noise of the outputs is, what it costs to be rid of it, and whether that is so."""
    by_key = {module.key: module for module in found.modules}
    scale = heats(module.sqnr_db for module in found.modules)
    ranked = by_key.keys()
    key = legend(
        scale,
        "output SQNR, dB",
        kept=any(module.tag and module.key not in ranked for module in network.modules),
        plain="-" if any(m.key not in ranked and not m.tag for m in network.modules) else None,
        marked="chosen to protect" if found.chosen else None,
    )
    maps = map_figure(
        network,
        "noise",
        "Modules by output SQNR",
        lambda module: _ranked_cell(module, by_key, scale, found.chosen),
        key,
    )
    drawings = [tradeoff.curve(found)]
    drawings += [tradeoff.ladder(found)] if found.rungs else []
    trade = Figure.of(
        "protection",
        "What protecting modules costs, and what it brings",
        tuple(drawings),
        "Noise against bytes: every choice that no other beats in both, as the ranking has it."
        + (" Beside it, real conversions." if found.rungs else " Nothing of it was converted."),
    )
    bases = Counter(module.basis for module in found.modules)
    how = ", ".join(f"{bases[each]:,} {_BASES.get(each, each)}" for each in sorted(bases))
    lead = paragraph(
        f"Noise that quantizing by the recipe {found.recipe} adds to the outputs of "
        f"{count(len(found.modules), 'module')}: {how}."
        + ("" if found.recipe == recipe else " That is another recipe than this checkpoint's.")
    )
    content: tuple[object, ...] = (
        lead,
        notes(found.warnings),
        maps.markup(),
        _fragile(found),
        trade.markup(),
        folded("The ladder in a table", _ladder(found)) if found.rungs else None,
    )
    return Section("ranking", "What is fragile", content, (maps, trade))


def _ranked_cell(
    module: Module, by_key: dict[Key, RankedModule], scale: Heats, chosen: frozenset[Key]
) -> Cell:
    ranked = by_key.get(module.key)
    if ranked is None:
        text = module.tag or "-"
        return Cell(text, None, bool(module.tag), f"{module.title} · not ranked")
    title = f"{module.locked.part}: {module.locked.name} · output SQNR {_db(ranked.sqnr_db)}"
    title += f", {_BASES.get(ranked.basis, ranked.basis)}"
    if ranked.max_to_median is not None:
        title += f" · largest input {figure(ranked.max_to_median)} times the median channel's"
    if ranked.worst_bin is not None:
        title += f" · noisiest at timesteps {ranked.worst_bin[0]:g} to {ranked.worst_bin[1]:g}"
    title += f" · protecting it adds {size(ranked.extra_bytes)}"
    marked = module.key in chosen
    title += " · chosen to be protected" if marked else ""
    return Cell(decibels(ranked.sqnr_db), scale.of(ranked.sqnr_db), False, title, marked)


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"


def _fragile(found: Ranked) -> Markup:
    rows = [
        (
            module.key[1],
            module.key[0],
            decibels(module.sqnr_db),
            "" if module.max_to_median is None else figure(module.max_to_median),
            ""
            if module.worst_bin is None
            else f"{module.worst_bin[0]:g} to {module.worst_bin[1]:g}",
            size(module.extra_bytes),
            "chosen" if module.key in found.chosen else "",
        )
        for module in found.modules[:MOST_FRAGILE]
    ]
    headers = (
        *("module", "part", "output SQNR, dB", "input max / median", "noisiest timesteps"),
        *("protecting adds", "protect"),
    )
    caption = f"The {len(rows)} noisiest of {len(found.modules):,}"
    return table(headers, rows, "llrrrrl", caption)


def _ladder(found: Ranked) -> Markup:
    rows = [
        (rung.order, rung.protected, rung.modules, size(rung.extra_bytes), figure(rung.value))
        for rung in found.rungs
    ]
    return table(("order", "groups", "modules", "bytes more", "value"), rows, "lrrrr")


def inputs_section(found: Sequence[Measured]) -> Section:
    """The spikiest inputs over timesteps, file by file."""
    content: list[object] = [
        paragraph(
            "The largest absolute input of any channel, beside that of the median channel. Where "
            "they are far apart, few channels take the whole range of codes."
        )
    ]
    figures = []
    for index, measured in enumerate(found, start=1):
        shown = measured.modules[:MOST_SPIKY]
        bins = measured.header.timesteps
        title = f"The {len(shown)} spikiest of {len(measured.modules):,} modules"
        several = len(bins) > 1
        drawings = timesteps.panels(shown, bins) if several else [timesteps.dumbbells(shown)]
        caption = f"{title}; axes are logarithmic."
        drawn = Figure.of(f"inputs-{index}", title, drawings, caption, timesteps.key())
        figures.append(drawn)
        if len(found) > 1:
            content.append(element("h3", measured.source.name))
        content += [drawn.markup(), folded("All modules in a table", _maxima(measured))]
    title = "Inputs over timesteps" if any(len(m.header.timesteps) > 1 for m in found) else "Inputs"
    return Section("inputs", title, tuple(content), tuple(figures))


def _maxima(found: Measured) -> Markup:
    rows = [
        (each.name, each.part, figure(each.max_to_median), *map(figure, each.largest))
        for each in found.modules
    ]
    headers = [f"{each.start:g} to {each.stop:g}" for each in found.header.timesteps]
    return table(
        ("module", "part", "max / median", *headers),
        rows,
        "ll" + "r" * (1 + len(headers)),
        "Largest input by timesteps, the spikiest module first",
    )


def evaluation_section(found: Sequence[Judged]) -> Section:
    """Intervals and verdicts, file by file, metric by metric."""
    content: list[object] = [
        paragraph(
            "Differences from the reference, paired by prompt. A verdict goes by tests that are "
            "adjusted for all comparisons of a file, an interval is not, so it may leave out zero "
            "where nothing is shown. An interval that holds zero shows nothing by itself: two are "
            "called equivalent only where a difference as large as the declared margin was "
            "tested, and ruled out."
        )
    ]
    figures = []
    for index, judged in enumerate(found, start=1):
        evaluated = judged.evaluated
        metrics = list(dict.fromkeys(each.metric for each in evaluated.comparisons))
        drawings = tuple(
            forest.forest(
                evaluated.reference,
                metric,
                evaluated.metrics[metric],
                [each for each in evaluated.comparisons if each.metric == metric],
            )
            for metric in metrics
        )
        percent = f"{evaluated.confidence * 100:.4g} %"
        title = f"Differences from {evaluated.reference}, {percent} intervals"
        drawn = Figure.of(
            f"evaluation-{index}",
            title,
            drawings,
            f"Mean difference from {evaluated.reference} with its {percent} interval "
            "(Student's t).",
        )
        figures.append(drawn)
        if len(found) > 1:
            content.append(element("h3", judged.source.name))
        content += [notes(evaluated.warnings), drawn.markup(), _verdicts(evaluated)]
    return Section("evaluation", "Evaluation", tuple(content), tuple(figures))


def verdict_counts(found: Sequence[Judged]) -> list[tuple[Verdict, int]]:
    """How often each verdict was reached, over all files; those that never were are left out."""
    counts = Counter(each.verdict for judged in found for each in judged.evaluated.comparisons)
    return [(verdict, counts[verdict]) for verdict in VERDICTS if counts[verdict]]


def _verdicts(found: Evaluated) -> Markup:
    margins = {name: metric.margin for name, metric in found.metrics.items()}
    rows = [
        (
            each.variant,
            each.metric,
            figure(each.mean),
            figure(each.reference_mean),
            forest.interval_text(each),
            "" if (margin := margins[each.metric]) is None else f"±{margin:.4g}",
            f"{each.prompts:,}",
            _verdict(each),
            each.explanation,
        )
        for each in found.comparisons
    ]
    headers = (
        *("variant", "metric", "mean", f"mean of {found.reference}", "difference", "margin"),
        *("prompts", "verdict", "why"),
    )
    return table(headers, rows, "llrrrrrlw", "Every comparison")


def _verdict(each: Compared) -> Markup:
    return element("span", each.verdict, class_=f"verdict {forest.LOOKS[each.verdict][1]}")


def images_section(found: Gallery) -> Section:
    """Images side by side."""
    rows = [
        (
            name,
            *(
                element(
                    "img",
                    src=picture.url,
                    alt=f"{name}, {variant}",
                    width=picture.width,
                    height=picture.height,
                    class_="tiny" if max(picture.width, picture.height) <= _TINY else None,
                )
                for variant, picture in zip(found.variants, pictures, strict=True)
            ),
        )
        for name, pictures in found.rows
    ]
    lead = f"{len(rows):,} of {count(found.common, 'file')} that all have, evenly chosen by name"
    shrunk = any((p.width, p.height) != p.original for _, row in found.rows for p in row)
    lead += f", scaled down to {found.longest} pixels: details are lost." if shrunk else "."
    grid = element("div", table(("file", *found.variants), rows), class_="gallery")
    return Section("images", "Images", (paragraph(lead), grid))


def speeds_section(found: Timed) -> Section:
    """A benchmark as bars and as a table."""
    drawings = tuple(speeds.panels(found))
    title = f"Numbers of {found.source.name}"
    drawn = (Figure.of("speeds", title, drawings),) if drawings else ()
    names = speeds.numbers_of(found)
    rows = []
    for row in found.rows:
        numbers = dict(row.numbers)
        cells = [figure(numbers[name]) if name in numbers else "" for name in names]
        rows.append((speeds.label(row), *cells))
    listed = table(("", *names), rows, "l" + "r" * len(names))
    content: list[object] = [
        paragraph(f"As {found.source.name} has them, under its own names."),
        *(each.markup() for each in drawn),
        folded("All numbers in a table", listed) if drawn else listed,
    ]
    return Section("speeds", "Speeds", tuple(content), drawn)
