"""The page: one HTML file that needs nothing else, and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantrecipe.evaluate.reporting import sizes
from quantrecipe.evaluate.reporting.checkpoint_sections import provenance_section, sizes_section
from quantrecipe.evaluate.reporting.markup import Markup, element, joined
from quantrecipe.evaluate.reporting.materials import Materials
from quantrecipe.evaluate.reporting.modules import Network, network
from quantrecipe.evaluate.reporting.network_sections import depth_section, network_section
from quantrecipe.evaluate.reporting.result_sections import (
    evaluation_section,
    images_section,
    inputs_section,
    ranking_section,
    speeds_section,
    verdict_counts,
)
from quantrecipe.evaluate.reporting.sections import Figure, Section
from quantrecipe.evaluate.reporting.style import stylesheet
from quantrecipe.evaluate.reporting.wording import count, decibels, size, stored_as
from quantrecipe.schema.lock import Lock

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True, slots=True)
class Report:
    """A report.

    Attributes:
        sections: in the order of the page.
        html: the page; also well-formed XML after its first line.
    """

    sections: tuple[Section, ...]
    html: str

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Every figure, in the order of the page."""
        return tuple(figure for section in self.sections for figure in section.figures)


def build(materials: Materials, version: str) -> Report:
    """Build a report; the same materials make the same bytes.

    Args:
        materials: what it is made of.
        version: of this package.
    """
    lock = materials.lock
    found = network(lock)
    sections = [network_section(found), depth_section(found)]
    if materials.ranked is not None:
        sections.append(ranking_section(materials.ranked, found, lock.recipe.name))
    if materials.measured:
        sections.append(inputs_section(materials.measured))
    if materials.judged:
        sections.append(evaluation_section(materials.judged))
    if materials.gallery is not None:
        sections.append(images_section(materials.gallery))
    sections.append(sizes_section(lock))
    if materials.timed is not None:
        sections.append(speeds_section(materials.timed))
    sections.append(provenance_section(materials, version))
    kept = tuple(section for section in sections if section is not None)
    return Report(kept, _document(materials, found, kept))


def _document(materials: Materials, found: Network, sections: Sequence[Section]) -> str:
    lock = materials.lock
    title = f"{lock.recipe.name}: report"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", Markup(stylesheet())),
    )
    links = [
        element("li", element("a", section.title, href=f"#{section.name}")) for section in sections
    ]
    header = element(
        "header",
        element("h1", lock.recipe.name),
        element("p", lock.recipe.description, class_="lead") if lock.recipe.description else None,
        element("nav", element("ul", *links), aria_label="Sections"),
        element("dl", *_tiles(materials, found), class_="tiles"),
    )
    footer = element(
        "footer",
        "What is measured is measured on what the files above name; nothing on this page is filled "
        "in where a file was missing.",
    )
    body = joined(
        (header, element("main", *(section.markup() for section in sections)), footer), "\n"
    )
    page = element(
        "html", head, element("body", body), lang="en", xmlns="http://www.w3.org/1999/xhtml"
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _tiles(materials: Materials, found: Network) -> list[Markup]:
    lock = materials.lock
    source, output = sizes.source_bytes(lock), sizes.output_bytes(lock)
    share = f"{output / source:.1%} of the source's {size(source)}" if source else ""
    tiles = [_tile("Size", size(output), share)]
    quantized = [module for module in found.modules if module.measured]
    kept = len(found.modules) - len(quantized)
    tiles.append(_tile("Quantized", count(len(quantized), "module"), f"{kept:,} are not"))
    noisy = [module for module in quantized if module.sqnr_db is not None]
    if noisy:
        worst = min(noisy, key=lambda module: (module.sqnr_db or 0.0, module.key))
        where = f"{worst.locked.part}: {worst.locked.name}"
        tiles.append(_tile("Lowest weight SQNR", f"{decibels(worst.sqnr_db)} dB", where))
    tiles.append(_tile("Stored as", *_formats(lock)))
    if materials.judged:
        counts = verdict_counts(materials.judged)
        total = sum(number for _, number in counts)
        said = ", ".join(f"{number:,} {verdict}" for verdict, number in counts)
        tiles.append(_tile("Evaluation", count(total, "comparison"), said))
    return tiles


def _tile(name: str, value: str, about: str) -> Markup:
    small = element("small", about) if about else None
    return element("div", element("dt", name), element("dd", value, small), class_="tile")


def _formats(lock: Lock) -> tuple[str, str]:
    modules = [module for module in lock.modules if module.disposition == "quantized"]
    formats = sorted({stored_as(module.weight) for module in modules})
    coded = {m.activation for m in modules if m.activation}
    about = sorted({f"activations {each.format} by {each.granularity}" for each in coded})
    about += sorted({f"{m.smoothing.kind}, {m.smoothing.apply}" for m in modules if m.smoothing})
    about += sorted({f"rotated by {m.rotation.size}" for m in modules if m.rotation})
    return ", ".join(formats) or "plain numbers", "; ".join(about)
