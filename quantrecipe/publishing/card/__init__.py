"""The model card: ``README.md`` of a published checkpoint, of facts only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from quantrecipe.evaluate.reporting.wording import count, stored_as
from quantrecipe.publishing.card.errors import errors
from quantrecipe.publishing.card.files import files, provenance
from quantrecipe.publishing.card.layout import layout
from quantrecipe.publishing.card.markdown import Markdown, code, codes, link, text
from quantrecipe.publishing.card.metadata import front_matter
from quantrecipe.publishing.card.protected import protected
from quantrecipe.publishing.card.quantized import quantized
from quantrecipe.publishing.card.results import results, speed
from quantrecipe.publishing.card.running import running, terms
from quantrecipe.publishing.card.words import alike, numbers_in, parts_of, share, weights_in
from quantrecipe.publishing.facts import Facts

_SECTIONS: Final[Sequence[tuple[str, Callable[[Facts], Sequence[Markdown]]]]] = (
    ("Running it", running),
    ("Licence and access", terms),
    ("What is quantized", quantized),
    ("Protected and passed through", protected),
    ("Layout", layout),
    ("Error of the weights", errors),
    ("Results", results),
    ("Speed", speed),
    ("Sizes and files", files),
    ("Provenance", provenance),
)


def model_card(facts: Facts) -> str:
    """The text of ``README.md``; the same facts make the same text.

    Sections of which nothing is known are left out. Texts that come from elsewhere are escaped, so
    that none can be more than text.
    """
    blocks = [f"# {text(facts.lock.recipe.name)}", *_introduction(facts)]
    for title, write in _SECTIONS:
        written = write(facts)
        if written:
            blocks += [f"## {title}", *written]
    return f"{front_matter(facts)}\n" + "\n\n".join(blocks) + "\n"


def _introduction(facts: Facts) -> list[str]:
    lock = facts.lock
    total, parts = numbers_in(lock), parts_of(lock)
    stored = alike(lock.modules, lambda module: stored_as(module.weight))
    stored.sort(key=lambda mine: -sum(map(weights_in, mine)))
    said = [
        f"{text(stored_as(mine[0].weight))} for {count(len(mine), 'module')} "
        f"({share(sum(map(weights_in, mine)), total)} of the parameters)"
        for mine in stored
    ]
    kinds = ", ".join(said) or "tensors of no module"
    if facts.base is None:
        source = "of a source that nobody named"
    else:
        source = f"of {link(facts.base.repo, facts.base.page)}"
        if facts.base.commit is not None:
            source += f" at commit {code(facts.base.commit)}"
    where = f", in {count(len(parts), 'part')} ({codes(parts)})" if len(parts) > 1 else ""
    blocks = [f"The weights {source}, stored as {kinds}{where}."]
    if lock.recipe.description:
        blocks.append(f"> The recipe says of itself: {text(lock.recipe.description)}")
    return blocks
