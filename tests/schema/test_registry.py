"""What is known by name: built in, and added by other projects' entry points."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantrecipe.schema import registry
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.registry import (
    entry_points_by_name,
    layout_names,
    load_named,
    named_layout,
    named_names,
    recipe_names,
    recipe_text,
    resolve_layout,
    resolve_names,
)
from quantrecipe.schema.validation import known_layouts, known_names, validate_value

Install = Callable[..., Path]


def forget() -> None:
    """What is installed changes during these tests only."""
    for cached in (registry._documents, registry.named_layout, registry.named_names):
        cached.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a project of a name with entry points, and modules of these texts."""

    def do(project: str, group: str, points: dict[str, str], **modules: str) -> Path:
        folder = tmp_path / project
        info = folder / f"{project}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        lines = [f"[quantrecipe.{group}]", *(f"{name} = {at}" for name, at in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(text, "utf-8")
        monkeypatch.syspath_prepend(str(folder))
        forget()
        return folder

    before = set(sys.modules)
    forget()
    yield do
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]
    monkeypatch.undo()
    forget()


def refused(what: Callable[[], Any]) -> Problem:
    with pytest.raises(InvalidInput) as caught:
        what()
    (problem,) = caught.value.problems
    return problem


# -- built in -------------------------------------------------------------------------------------


def test_the_built_in_layouts() -> None:
    assert {"plain", "fp8-scaled", "int8-scaled", "transformerlab"} <= set(layout_names())
    for name in layout_names():
        assert named_layout(name).name == name
        assert name in known_layouts()
    assert sorted(known_layouts()) == layout_names()
    assert len(known_layouts()) == len(layout_names())
    assert "fp8-scald" not in known_layouts()


def test_the_built_in_names() -> None:
    assert {"ideogram4-diffusers", "ideogram4-original"} <= set(known_names())
    for name in known_names():
        assert named_names(name).name == name
        assert resolve_names(name) == named_names(name).names
    assert len(known_names()) == len(list(known_names()))
    assert "ideogram4" not in known_names()
    assert resolve_names(None) == ()


def test_the_names_of_ideogram_4_are_each_other_backwards() -> None:
    there, back = (resolve_names(f"ideogram4-{which}") for which in ("diffusers", "original"))
    assert [(m.sources, m.targets) for m in there] == [(m.targets, m.sources) for m in back]


@pytest.mark.parametrize(
    ("ask", "kind", "near"),
    [
        (lambda: named_layout("fp8-scald"), "unknown-layout", "fp8-scaled"),
        (lambda: named_names("ideogram4-diffuser"), "unknown-names", "ideogram4-diffusers"),
        (lambda: recipe_text("ideogram-4-fp9"), "unknown-recipe", "ideogram-4-fp8"),
        (
            lambda: load_named("quantrecipe.converters", "straeming", "converter"),
            "unknown-converter",
            "streaming",
        ),
    ],
    ids=["layout", "names", "recipe", "converter"],
)
def test_an_unknown_name_gets_a_near_one(ask: Callable[[], Any], kind: str, near: str) -> None:
    problem = refused(ask)
    assert problem.kind == kind
    assert problem.hint == f"Did you mean {near!r}?"


def test_a_layout_written_out_in_a_recipe_stands_for_itself(headers: ModuleType) -> None:
    document = headers.layout("plain")
    recipe = headers.recipe(source={"layout": document})
    resolved = resolve_layout(recipe.source.layout)
    assert resolved == recipe.source.layout
    assert resolved.name == "custom"
    assert not validate_value(recipe.to_json_value())


# -- entry points ---------------------------------------------------------------------------------


def layout_module(headers: ModuleType, name: str) -> str:
    return f"DOCUMENT = {headers.layout('plain', name=name)!r}\n"


def test_a_layout_by_entry_point(headers: ModuleType, install: Install) -> None:
    install("acme", "layouts", {"acme": "acme_l:DOCUMENT"}, acme_l=layout_module(headers, "acme"))
    assert "acme" in layout_names()
    assert "acme" in known_layouts()
    assert named_layout("acme").name == "acme"
    recipe = headers.recipe(source={"layout": "acme"})
    assert not validate_value(recipe.to_json_value())
    assert not headers.problems(recipe, headers.source(headers.linear("x", 4, 4)))


def test_names_by_entry_point(headers: ModuleType, install: Install) -> None:
    document = {
        "kind": "names",
        "version": 1,
        "name": "acme",
        "names": [{"from": "x", "into": "y"}],
    }
    install("acme", "names", {"acme": "acme_n:X"}, acme_n=f"X = {document!r}")
    assert "acme" in known_names()
    recipe = headers.recipe(rules=["y"], target={"layout": "int8-scaled", "names": "acme"})
    assert not validate_value(recipe.to_json_value())
    assert not headers.problems(recipe, headers.source(headers.linear("x", 4, 4)))


def test_a_recipe_by_entry_point_may_be_a_file(headers: ModuleType, install: Install) -> None:
    text = json.dumps(headers.recipe().to_json_value())
    module = "from pathlib import Path\nPATH = Path(__file__).with_name('r.json')\n"
    folder = install("acme", "recipes", {"acme-r": "acme_r:PATH"}, acme_r=module)
    (folder / "r.json").write_text(text, "utf-8")
    assert "acme-r" in recipe_names()
    assert recipe_text("acme-r") == text


def test_an_entry_point_is_loaded_by_name(install: Install) -> None:
    install("acme", "converters", {"acme": "acme_c:Made"}, acme_c="class Made: pass\n")
    assert load_named("quantrecipe.converters", "acme", "converter").__name__ == "Made"
    assert list(entry_points_by_name("quantrecipe.converters")) == sorted(
        entry_points_by_name("quantrecipe.converters")
    )


def test_one_name_of_two_projects_is_refused(install: Install) -> None:
    install("acme", "kernels", {"fast": "acme_k:Fast"})
    install("emca", "kernels", {"fast": "emca_k:Fast"})
    problem = refused(lambda: entry_points_by_name("quantrecipe.kernels"))
    assert problem.kind == "duplicate-entry-point"
    assert "acme" in problem.message
    assert "emca" in problem.message
    assert "'fast' in quantrecipe.kernels" in problem.message


def test_one_project_seen_twice_is_fine(install: Install) -> None:
    install("acme", "kernels", {"fast": "acme_k:Fast"})
    install("again", "kernels", {"fast": "acme_k:Fast"})
    assert list(entry_points_by_name("quantrecipe.kernels")).count("fast") == 1


@pytest.mark.parametrize(("group", "name"), [("layouts", "plain"), ("recipes", "ideogram-4-fp8")])
def test_a_built_in_name_is_taken(install: Install, group: str, name: str) -> None:
    install("acme", group, {name: "acme_x:DOCUMENT"})
    problem = refused(layout_names if group == "layouts" else recipe_names)
    assert problem.kind == "duplicate-entry-point"
    assert "built in" in problem.message


def test_a_layout_under_another_name_than_its_own(headers: ModuleType, install: Install) -> None:
    install("acme", "layouts", {"acme": "acme_l:DOCUMENT"}, acme_l=layout_module(headers, "emca"))
    problem = refused(lambda: named_layout("acme"))
    assert problem.kind == "misnamed-layout"
    assert "'emca'" in problem.message


def test_a_layout_that_does_not_hold_to_the_schema(install: Install) -> None:
    install("acme", "layouts", {"acme": "acme_l:X"}, acme_l="X = {'kind': 'layout', 'version': 1}")
    with pytest.raises(InvalidInput) as caught:
        named_layout("acme")
    assert {problem.file for problem in caught.value.problems} == {"layout acme"}


BROKEN = [
    ("no module", "absent_module:X", ""),
    ("no attribute", "acme_l:Y", "X = {}"),
    ("no file", "acme_l:X", "X = '/nonexistent/layout.json'"),
    ("no document", "acme_l:X", "X = 7"),
]


@pytest.mark.parametrize(("at", "text"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_broken_entry_point_is_told_of(install: Install, at: str, text: str) -> None:
    install("acme", "layouts", {"acme": at}, acme_l=text)
    problem = refused(lambda: named_layout("acme"))
    assert problem.kind == "broken-entry-point"
    assert at in problem.message
    # What is built in still works.
    assert named_layout("plain").name == "plain"


def test_a_broken_converter_is_told_of(install: Install) -> None:
    install("acme", "converters", {"acme": "absent_module:X"})
    problem = refused(lambda: load_named("quantrecipe.converters", "acme", "converter"))
    assert problem.kind == "broken-entry-point"
