"""The sections on files: what they take, and where all of it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from quantrecipe.evaluate.reporting import sizes
from quantrecipe.evaluate.reporting.drawing import Rect
from quantrecipe.evaluate.reporting.markup import Markup, element, folded, table
from quantrecipe.evaluate.reporting.materials import Materials
from quantrecipe.evaluate.reporting.sections import Figure, Section, paragraph
from quantrecipe.evaluate.reporting.svg import swatch
from quantrecipe.evaluate.reporting.wording import count, size
from quantrecipe.schema.lock import LOCK_NAME, RECIPE_NAME, Lock

_MANY_FILES: Final = 12


def sizes_section(lock: Lock) -> Section:
    """Bytes by how they are stored."""
    found = sizes.amounts(lock)
    kinds, total = list(found), sizes.output_bytes(lock)
    figure = Figure.of("sizes", "Bytes before and after", (sizes.bars(lock),))
    rows = [
        (
            element("span", swatch((Rect(1, 1, 20, 12, sizes.tone(kinds, kind), "edge"),)), " "),
            f"{index}. {kind}",
            size(nbytes),
            _share(nbytes, total),
        )
        for index, (kind, nbytes) in enumerate(found.items(), start=1)
    ]
    listed = table(("", "what", "bytes", "share"), rows, "llrr", "The output")
    content = (element("div", figure.markup(), listed, class_="beside"),)
    return Section("sizes", "Sizes", content, (figure,))


def _share(nbytes: int, total: int) -> str:
    share = nbytes / total if total else 0.0
    return "< 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def provenance_section(materials: Materials, version: str) -> Section:
    """Where everything comes from: by digest, as files say it."""
    lock = materials.lock
    recipe = lock.recipe
    facts: list[tuple[object, object]] = [
        ("recipe", recipe.name),
        ("recipe, SHA-256", _hash(lock.recipe_sha256)),
        ("lock, SHA-256", _hash(lock.sha256)),
    ]
    if recipe.source.repo is not None:
        facts.append(("source repository", recipe.source.repo))
    if recipe.source.revision is not None:
        facts.append(("source revision", element("span", recipe.source.revision, class_="hash")))
    facts += [
        ("layouts", f"{_layout(recipe.source.layout)} to {_layout(recipe.target.layout)}"),
        ("converted by", f"{lock.tool.name} {lock.tool.version}"),
        ("converter", f"{lock.converter.name} {lock.converter.version}"),
        ("this report by", f"quantrecipe {version}"),
    ]
    content: list[object] = [
        paragraph(
            "Digests are those of the lock and of the files this page was made of. The page holds "
            "no date: the same files give the same page."
        ),
        table(("what", "which"), facts),
        *_files("Source files", _sources(lock)),
        *_files("Files written", _outputs(lock)),
        *_made_of(materials),
        element("h3", "To check it"),
        element("pre", element("code", *_commands())),
    ]
    return Section("provenance", "Provenance", tuple(content))


def _layout(layout: object) -> str:
    return layout if isinstance(layout, str) else f"{getattr(layout, 'name', '')} (in the recipe)"


def _hash(digest: str) -> Markup:
    return element("span", digest, class_="hash")


def _sources(lock: Lock) -> list[tuple[object, ...]]:
    return [
        (
            file.path,
            file.part,
            f"{file.bytes:,}",
            _hash(file.sha256)
            if file.sha256 is not None
            else element("span", "header ", _hash(file.header_sha256)),
        )
        for file in lock.source
    ]


def _outputs(lock: Lock) -> list[tuple[object, ...]]:
    return [
        (file.path, kind, f"{file.bytes:,}", _hash(file.sha256))
        for kind, files in (("tensors", lock.outputs), ("beside them", lock.sidecars))
        for file in files
    ]


def _files(title: str, rows: Sequence[Sequence[object]]) -> Iterable[Markup]:
    listed = table(("file", "", "bytes", "SHA-256"), rows, "llr")
    if len(rows) > _MANY_FILES:
        return [folded(f"{title} ({len(rows):,})", listed)]
    return [element("h3", title), listed]


def _made_of(materials: Materials) -> list[Markup]:
    rows: list[tuple[object, ...]] = []
    if materials.ranked is not None:
        ranked = materials.ranked
        about = f"ranking of recipe {ranked.recipe}, protected modules in {ranked.dtype}"
        rows.append((ranked.source.name, about, _hash(ranked.source.sha256)))
    for measured in materials.measured:
        header = measured.header
        about = f"statistics of {header.model}: {count(header.samples, 'sample')}, "
        about += count(len(header.timesteps), "timestep bin")
        rows.append((measured.source.name, about, _hash(measured.source.sha256)))
        if header.prompts_sha256 is not None:
            rows.append(("", "digest of its prompts", _hash(header.prompts_sha256)))
    for judged in materials.judged:
        evaluated = judged.evaluated
        software = ", ".join(f"{name} {version}" for name, version in evaluated.software)
        rows.append((judged.source.name, f"evaluation, {software}", _hash(judged.source.sha256)))
        if evaluated.recipe is not None:
            name, digest = evaluated.recipe.name, evaluated.recipe.sha256
            rows.append(("", f"declared by recipe {name}", _hash(digest)))
        rows += [("", f"scores, {each.name}", _hash(each.sha256)) for each in evaluated.inputs]
    if materials.timed is not None:
        timed = materials.timed.source
        rows.append((timed.name, "benchmark", _hash(timed.sha256)))
    if not rows:
        return []
    listed = table(("file", "what", "SHA-256"), rows)
    if len(rows) > _MANY_FILES:
        return [folded(f"What else this page was made of ({len(rows):,})", listed)]
    return [element("h3", "What else this page was made of"), listed]


def _commands() -> Iterable[Markup]:
    """What anybody can run in the folder that holds the lock."""
    lines = (
        f"# {LOCK_NAME}: every byte that was written, and every weight against its source",
        "quantrecipe verify .",
        "quantrecipe verify . --against SOURCE",
        "# the same again",
        f"convert --recipe {RECIPE_NAME} SOURCE --out AGAIN",
    )
    for line in lines:
        yield element("span", line)
        yield Markup("\n")
