"""The recipes and layouts that people are shown hold, and local links lead somewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantrecipe.schema.registry import LAYOUTS, NAMES
from quantrecipe.schema.semantics import recipe_problems
from quantrecipe.schema.validation import parse_layout, parse_names, parse_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```json\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)")


def documents() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), start=1):
            yield f"{page.name}:{number}", block
    for path in sorted((ROOT / "examples").rglob("*.json")):
        if {"weights", "results"} & set(path.parts):
            continue  # what lies there describes a model, or what was measured
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


DOCUMENTS = dict(documents())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_hold(name: str) -> None:
    text = DOCUMENTS[name]
    document = json.loads(text)
    if document["kind"] == "layout":
        assert parse_layout(text, name).name == document["name"]
    elif document["kind"] == "names":
        assert parse_names(text, name).name == document["name"]
    else:
        assert parse_recipe(text, name).name == document["name"]
        assert not list(recipe_problems(document, LAYOUTS, NAMES))


def test_the_example_of_loading_a_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block ``python run`` of docs/loading.md, with the imports at its top."""
    torch = pytest.importorskip("torch")
    from quantrecipe.converter import convert
    from tests.converter.making import parsed, recipe, save

    page = (ROOT / "docs" / "loading.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python run\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    imports = re.findall(r"^from quantrecipe\.loaders import .*load_model.*$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    source = save(tmp_path / "in.safetensors", torch.nn.Linear(8, 4).state_dict(prefix="a."))
    convert(parsed(recipe()), source, tmp_path / "model-int8")

    def model() -> object:
        return torch.nn.ModuleDict({"a": torch.nn.Linear(8, 4)})

    found: dict[str, Any] = {"MyModel": model}
    exec("\n".join([*imports, example]), found)
    assert found["report"].quantized == 1
    assert found["model"]["a"].bias.dtype == torch.bfloat16


def test_the_example_of_a_kernel_computes() -> None:
    """The block ``python run`` of docs/kernels.md."""
    torch = pytest.importorskip("torch")
    from quantrecipe.loaders.kernels import Kernel, LinearCall, find_kernel

    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python run\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    exec(example, found)
    kernel = found["Float32"]()
    assert isinstance(kernel, Kernel)
    assert kernel.name == "float32"
    call = LinearCall(
        rows=3,
        out_features=4,
        in_features=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
        code_dtype=torch.int8,
        scale_dtype=torch.float32,
        group=(1, 8),
        activation="",
        smoothing=True,
        rotation=0,
        bias=True,
    )
    assert kernel.refuses(call) is None
    assert kernel.refuses(replace(call, activation="int8:token"))
    assert kernel.refuses(replace(call, rotation=4))
    generator = torch.Generator().manual_seed(0)
    x, scale = (torch.rand(*shape, generator=generator) + 0.5 for shape in [(3, 8), (4, 1)])
    factors, bias = (torch.rand(size, generator=generator) + 0.5 for size in (8, 4))
    codes = torch.randint(-127, 128, (4, 8), dtype=torch.int8, generator=generator)
    expected = find_kernel("reference").linear(call, x, codes, scale, factors, bias)
    torch.testing.assert_close(kernel.linear(call, x, codes, scale, factors, bias), expected)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
