"""The sections on running a checkpoint, and on the terms that it comes under."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from quantrecipe.evaluate.reporting.markup import clean
from quantrecipe.evaluate.reporting.wording import count
from quantrecipe.publishing.card.markdown import (
    Markdown,
    code,
    codes,
    fenced,
    link,
    listed,
    shell,
    text,
)
from quantrecipe.publishing.card.words import bytes_text, parts_of
from quantrecipe.publishing.facts import Base, Facts, License, Needed
from quantrecipe.schema.lock import Lock

_DTYPE: Final[Mapping[str, str]] = MappingProxyType(
    {"diffusers": "torch_dtype", "transformers": "dtype"}
)
"""What libraries that open the layout call the dtype of what is not quantized."""


def running(facts: Facts) -> list[Markdown]:
    """Packages, what else to fetch, the command, and what to write in Python."""
    usage = facts.usage
    commands = []
    if facts.repo is not None:
        folder = facts.repo.rpartition("/")[2]
        commands += [
            f"hf download {shell(facts.repo)} --local-dir {shell(folder)}",
            f"cd {shell(folder)}",
        ]
    if usage.packages:
        commands.append(f"pip install {' '.join(map(shell, usage.packages))}")
    if usage.needed is not None:
        commands.append("python download_deps.py")
    commands.append(clean(usage.command))
    blocks = [fenced(commands, "shell"), text(usage.summary)]
    if usage.needed is not None:
        blocks.append(_needed(usage.needed, facts.base))
    if usage.example:
        blocks += [Markdown("In Python, in this folder:"), fenced(usage.example, "python")]
    if facts.loader:
        which = "With a class of your own" if usage.example else "In Python"
        said = f"{which}, {code('safetensors_loader.py')} needs torch and safetensors only:"
        blocks += [Markdown(said), fenced(list(_with_the_loader(facts.lock)), "python")]
    opened = list(_from_pretrained(facts))
    if opened:
        said = f"With {code('quantrecipe')} installed, {code('from_pretrained')} opens it:"
        blocks += [Markdown(said), fenced(opened, "python")]
    return blocks


def _needed(needed: Needed, base: Base | None) -> Markdown:
    at_base = base is not None and base.repo == needed.repo
    where = link(needed.repo, base.page) if base is not None and at_base else code(needed.repo)
    said = (
        f"{code('download_deps.py')} fetches {count(len(needed.files), 'file')}, "
        f"{bytes_text(sum(needed.files.values()))}, of {where} at commit {code(needed.commit)}: "
        "what the checkpoint does not hold and running it needs."
    )
    if needed.gated:
        said += " That repository is gated: accept its terms there first, and log in."
    return Markdown(said)


def _with_the_loader(lock: Lock) -> Iterator[str]:
    parts = parts_of(lock)
    yield from ("from safetensors_loader import load, without_weights", "")
    for part in parts:
        name = _variable(part, parts)
        which = f', part="{part}"' if len(parts) > 1 else ""
        yield from (
            "with without_weights():",
            f"    {name} = ...  # the module",
            f'{name} = load({name}{which}, device="cuda")',
        )


def _variable(part: str, parts: Sequence[str]) -> str:
    """A name that is no keyword and nothing that is imported."""
    return f"{part}_model" if len(parts) > 1 else "model"


def _from_pretrained(facts: Facts) -> Iterator[str]:
    """Lines that open every part; none where no library finds it."""
    recipe, library = facts.lock.recipe, facts.base.library_name if facts.base else None
    target = recipe.target
    if target.layout != "quantrecipe" or library is None or library not in _DTYPE:
        return
    dtype = target.passthrough_dtype
    cast = "" if dtype == "keep" else f", {_DTYPE[library]}=torch.{dtype}"
    yield f"import quantrecipe.loaders.{library}"
    if cast:
        yield "import torch"
    yield from (f"from {library} import AutoModel", "")
    where = _literal(facts.repo or ".")
    parts = parts_of(facts.lock)
    for part in parts:
        folder = target.file_of(part).rpartition("/")[0]
        inside = f', subfolder="{folder}"' if folder else ""
        yield f"{_variable(part, parts)} = AutoModel.from_pretrained({where}{inside}{cast})"


def _literal(words: str) -> str:
    """A string as Python writes it, in characters that print."""
    return json.dumps(words) if words.isprintable() else ascii(words)


def terms(facts: Facts) -> list[Markdown]:
    """The licence, where it comes from, and who may have the base."""
    base = facts.base
    said = [Markdown(f"These weights are under {_license(facts.license)}.")]
    if base is None:
        return [listed(said)]
    of_base = link(base.repo, base.page)
    if base.license is None:
        said.append(Markdown(f"{of_base} states no licence."))
    elif base.license == facts.license:
        said.append(Markdown(f"That is the licence of {of_base}, carried over."))
    else:
        said.append(Markdown(f"{of_base} is under {_license(base.license)}."))
    if base.gated is not None:
        who = (
            "whoever accepts its terms" if base.gated == "auto" else "those whom its owner lets in"
        )
        said.append(Markdown(f"{of_base} is gated: its files are for {who}."))
        if base.gate:
            carried = "What it tells and asks them is carried over into this card"
            said.append(Markdown(f"{carried}: {codes(base.gate)}."))
    return [listed(said)]


def _license(license: License) -> Markdown:
    name = license.identifier if license.name is None else license.name
    if license.link is None:
        return code(name)
    return link(name, license.link)
