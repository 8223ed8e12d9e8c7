"""The recipes and layouts that people are shown hold, and local links lead somewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantrecipe.schema.registry import layout_names
from quantrecipe.schema.semantics import recipe_problems
from quantrecipe.schema.validation import parse_layout, parse_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```json\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)")


def documents() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), start=1):
            yield f"{page.name}:{number}", block
    for path in sorted((ROOT / "examples").rglob("*.json")):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


DOCUMENTS = dict(documents())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_hold(name: str) -> None:
    text = DOCUMENTS[name]
    document = json.loads(text)
    if document["kind"] == "layout":
        assert parse_layout(text, name).name == document["name"]
    else:
        assert parse_recipe(text, name).name == document["name"]
        assert not list(recipe_problems(document, layout_names()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
