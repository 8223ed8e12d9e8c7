"""The sections on files: what they take, by which digests they are known, and their origin."""

from __future__ import annotations

from quantrecipe.evaluate.reporting.sizes import output_bytes, source_bytes
from quantrecipe.evaluate.reporting.wording import count
from quantrecipe.publishing.card.markdown import (
    Markdown,
    code,
    codes,
    fenced,
    joined,
    link,
    shell,
    table,
)
from quantrecipe.publishing.card.words import bytes_text, long_table, share
from quantrecipe.publishing.facts import Facts
from quantrecipe.schema.lock import LOCK_NAME, RECIPE_NAME, Lock


def files(facts: Facts) -> list[Markdown]:
    """Bytes before and after, and every file that the lock vouches for."""
    lock = facts.lock
    before, after = source_bytes(lock), output_bytes(lock)
    number = count(len({file.path for file in lock.source}), "file")
    said = f"{bytes_text(after)} in {count(len(lock.outputs), 'file')} with tensors"
    if before:
        said += (
            f", {share(after, before)} of the source's {bytes_text(before)} in {number}"
            if after < before
            else f"; the source has {bytes_text(before)} in {number}"
        )
    rows = [
        (code(file.path), f"{file.bytes:,}", code(file.sha256))
        for file in (*lock.outputs, *lock.sidecars)
    ]
    return [
        Markdown(f"{said}. {code(LOCK_NAME)} vouches for these files:"),
        long_table("files", ("file", "bytes", "SHA-256"), rows, "lrl"),
    ]


def provenance(facts: Facts) -> list[Markdown]:
    """Where it comes from, who made it, and how to make and check it again."""
    lock, base = facts.lock, facts.base
    rows: list[tuple[object, object]] = []
    if base is not None:
        commit = "commit not known" if base.commit is None else code(base.commit)
        rows.append(("base", joined([link(base.repo, base.page), commit], ", ")))
    if lock.repository is not None:
        read = [code(lock.repository.repo), code(lock.repository.commit)]
        if lock.repository.revision is not None:
            read.append(joined(["asked for as", code(lock.repository.revision)], " "))
        rows.append(("read from", joined(read, ", ")))
    rows += [
        ("recipe", code(lock.recipe.name)),
        ("recipe, SHA-256 of its canonical form", code(lock.recipe_sha256)),
        (joined([code(LOCK_NAME), "its own SHA-256"], ", "), code(lock.sha256)),
        ("converted by", joined([lock.tool.name, lock.tool.version], " ")),
        ("converter", joined([lock.converter.name, lock.converter.version], " ")),
    ]
    sources = [
        (
            code(file.path),
            code(file.part),
            f"{file.bytes:,}",
            code(file.sha256)
            if file.sha256 is not None
            else joined(["of its header:", code(file.header_sha256)], " "),
        )
        for file in lock.source
    ]
    return [
        table(("what", "which"), rows),
        Markdown("The source:"),
        long_table("source files", ("file", "part", "bytes", "SHA-256"), sources, "llrl"),
        *_commands(lock),
    ]


def _commands(lock: Lock) -> list[Markdown]:
    source, about = "SOURCE", f"; {code('SOURCE')} is the folder of the files above"
    if lock.repository is not None:
        source, about = str(lock.repository.address), ""
    said = f"In this folder, the first command checks every byte, the second converts again{about}."
    statistics = sorted(lock.recipe.statistics())
    if statistics:
        said += f" The recipe also reads {codes(statistics)}, beside it."
    again = f"convert --recipe {RECIPE_NAME} {shell(source)} --out again"
    return [Markdown(said), fenced(["quantrecipe verify .", again], "shell")]
