"""Files on disk: located problems, suggestions, and errors of reading."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantrecipe.schema import validation
from quantrecipe.schema.document import Document, located, parse_text, read_document
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.structure import structure_problems
from quantrecipe.schema.validation import (
    examine,
    load_document,
    load_layout,
    load_lock,
    load_recipe,
    load_statistics_header,
    parse_layout,
    parse_recipe,
)

RECIPE: dict[str, Any] = {
    "kind": "recipe",
    "version": 1,
    "name": "small",
    "source": {"layout": "plain"},
    "schemes": {"a": {"weight": {"format": "int8", "granularity": "channel"}}},
    "rules": [{"modules": ["**"], "scheme": "a"}],
    "target": {"layout": "int8-scaled"},
}
YAML = """\
kind: recipe
version: 1
name: small
source: {layout: plain}
schemes:
  a:
    weight: {format: int8, granularity: channel}
rules:
  - modules: ["**"]
    scheme: a
target:
  layout: int8-scaled
bounds:
  min_weight_sqnr_db: 3e1
"""


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=1), "utf-8")
    return path


def problems_of(error: pytest.ExceptionInfo[InvalidInput]) -> list[tuple[str, int | None, str]]:
    return [(p.kind, p.line, p.pointer or "") for p in error.value.problems]


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    by_json = load_recipe(
        write(tmp_path / "r.json", {**RECIPE, "bounds": {"min_weight_sqnr_db": 30}})
    )
    by_yaml = load_recipe(write(tmp_path / "r.yml", YAML))
    assert isinstance(by_json, Recipe)
    assert by_json == by_yaml


def test_a_model_of_the_right_kind_comes_back(tmp_path: Path) -> None:
    document, model = load_document(write(tmp_path / "r.json", RECIPE))
    assert isinstance(model, Recipe)
    assert document.value == RECIPE


@pytest.mark.parametrize(
    ("load", "kind"), [(load_layout, "layout"), (load_lock, "lock")], ids=["layout", "lock"]
)
def test_another_kind_is_refused_as_that(load: Any, kind: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"expected a {kind}, found a recipe") as error:
        load(write(tmp_path / "r.json", RECIPE))
    assert problems_of(error) == [("wrong-kind", 2, "/kind")]


def test_a_statistics_header_is_read_from_text() -> None:
    header = {
        "kind": "statistics",
        "version": 1,
        "model": "owner/model",
        "samples": 2,
        "timesteps": [{"start": 0, "stop": 1, "samples": 3}],
        "modules": {"model": ["layers.0"]},
    }
    assert load_statistics_header(json.dumps(header)).samples == 2
    with pytest.raises(InvalidInput, match=r"quantrecipe\.statistics:1:"):
        load_statistics_header(json.dumps({**header, "samples": 0}))


def test_problems_of_every_sort_come_together_in_the_order_of_the_text(tmp_path: Path) -> None:
    text = """{
  "kind": "recipe", "version": 1, "name": "Small",
  "name": "small",
  "source": {"layout": "plane", "revision": "main"},
  "schemes": {"a": {"wieght": {"format": "int8", "granularity": "channel"}}},
  "rules": [{"modules": ["layers.{0..3"], "scheme": "b"}],
  "bounds": {"min_weight_sqnr_db": NaN},
  "target": {"layout": "int8-scaled"}
}"""
    with pytest.raises(InvalidInput) as error:
        load_recipe(write(tmp_path / "r.json", text))
    assert problems_of(error) == [
        ("duplicate-key", 3, "/name"),
        ("unknown-layout", 4, "/source/layout"),
        ("revision-without-repo", 4, "/source/revision"),
        ("unused-scheme", 5, "/schemes/a"),
        ("missing-field", 5, "/schemes/a/weight"),
        ("unknown-field", 5, "/schemes/a/wieght"),
        ("bad-module-pattern", 6, "/rules/0/modules/0"),
        ("unknown-scheme", 6, "/rules/0/scheme"),
        ("not-finite", 7, "/bounds/min_weight_sqnr_db"),
    ]
    assert all(problem.file == str(tmp_path / "r.json") for problem in error.value.problems)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"traget": 1}, "'target'"),
        ({"rules": [{"modules": ["**"], "scheme": "a", "part": ["model"]}]}, "'parts'"),
        ({"rules": [{"modules": ["**"], "scheme": "aa"}]}, "'a'"),
        ({"source": {"layout": "fp8_scaled"}}, "'fp8-scaled'"),
        ({"protected": [{"modules": ["a"], "dtype": "bfloat", "reason": "r"}]}, "'bfloat16'"),
        ({"schemes": {"a": {"weight": {"format": "fp8_e4m3fn"}}}}, "'float8_e4m3fn'"),
        ({"schemes": {"a": {"weight": {"format": "int8", "granularity": "chanel"}}}}, "'channel'"),
    ],
)
def test_near_misses_are_suggested(change: dict[str, Any], hint: str) -> None:
    with pytest.raises(InvalidInput) as error:
        parse_recipe(json.dumps({**RECIPE, **change}))
    hints = [problem.hint for problem in error.value.problems]
    assert f"Did you mean {hint}?" in hints


def test_a_misspelt_tag_is_suggested_where_the_tag_is_missing() -> None:
    weight = {"format": "int8", "granularty": "channel"}
    with pytest.raises(InvalidInput, match="There is 'granularty'; is that it") as error:
        parse_recipe(json.dumps({**RECIPE, "schemes": {"a": {"weight": weight}}}))
    assert problems_of(error) == [("missing-field", 1, "/schemes/a/weight/granularity")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "expected a string, found a whole number, 3"),
        ({"rules": {}}, "expected a list, found an empty object"),
        ({"rules": [{"modules": [], "scheme": "a"}]}, "at least 1 entry needed"),
        ({"name": "Small"}, "lower-case letters and digits"),
        ({"bounds": {"min_weight_sqnr_db": 1000}}, "1000 is out of range"),
        ({"source": {"layout": 3}}, "expected a string or an object, found a whole number, 3"),
        ({"version": 2}, "newest known here is 1"),
    ],
)
def test_messages_are_written_for_people(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        parse_recipe(json.dumps({**RECIPE, **change}))
    assert message in str(error.value)


def test_an_unknown_field_is_located_at_its_key_and_a_missing_one_at_its_object() -> None:
    text = '{"kind": "lock",\n "version": 1,\n\n  "extra": 1}'
    document = Document("x", parse_text(text, "x").value, parse_text(text, "x"))
    unknown = document.locate(Problem("unknown-field", "", pointer="/extra"))
    missing = document.locate(Problem("missing-field", "", pointer="/recipe/name"))
    assert (unknown.file, unknown.line, unknown.column) == ("x", 4, 3)
    assert (missing.file, missing.line, missing.column) == ("x", 1, 1)


def test_problems_of_other_files_keep_their_place() -> None:
    parsed = parse_text("{}", "x")
    document = Document("x", parsed.value, parsed)
    elsewhere = Problem("kind", "message", file="model.safetensors", pointer="/a")
    assert document.locate(elsewhere) == elsewhere
    error = located(InvalidInput([elsewhere, Problem("kind", "", pointer="")]), document)
    assert [(p.file, p.line) for p in error.problems] == [("model.safetensors", None), ("x", 1)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.json", "there is no such file"),
        ("recipe.jsn", "Did you mean"),
        ("folder", "this is a folder"),
        ("no/such/folder.json", "There is no folder"),
        ("recipe.json/inside", "cannot be read"),
        ("nul\0.json", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "recipe.json", RECIPE)
    with pytest.raises(InvalidInput, match=message) as error:
        load_recipe(f"{tmp_path}/{name}")
    (problem,) = error.value.problems
    assert problem.kind == "unreadable"
    assert problem.file == f"{tmp_path}/{name}"


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="everything may be read here"
)
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", RECIPE)
    path.chmod(0)
    with pytest.raises(InvalidInput, match="may not be read"):
        load_recipe(path)


@pytest.mark.parametrize("name", ["recipe.json", "recipe.yaml", "recipe.lock.json"])
def test_files_that_are_too_large_are_not_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.touch()
    os.truncate(path, 1 << 32)
    with pytest.raises(InvalidInput) as error:
        (load_lock if "lock" in name else load_recipe)(path)
    (problem,) = error.value.problems
    assert (problem.kind, problem.file) == ("too-large", str(path))
    assert f"the document has {1 << 32:,} bytes" in problem.message


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b'{"kind": "recipe"'))
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(InvalidInput, match="<stdin>:1:18"):
        read_document("-")


def test_a_layout_is_read_from_text() -> None:
    text = '{"kind": "layout", "version": 1, "name": "x", "others": {"name": "{tensor}"},'
    text += ' "modules": {"plain": {"weight": {"name": "{module}.w"}}}}'
    assert parse_layout(text, "layout x").name == "x"


def test_a_text_with_faults_has_no_document(tmp_path: Path) -> None:
    examined = examine(write(tmp_path / "r.json", '{"kind": "recipe", "kind": "recipe"}'))
    assert examined.kind == "recipe"
    assert examined.document is None
    assert examined.model is None


def test_a_list_that_lost_its_only_entry_is_not_called_short() -> None:
    value = {**RECIPE, "rules": [{"modules": [3], "scheme": "a"}]}
    assert [p.kind for p in structure_problems(value, "recipe")] == ["wrong-type"]


@pytest.mark.parametrize(
    "change",
    [
        {f"field{index}": 1 for index in range(1000)},
        {"rules": [{"modules": ["a"], "scheme": f"scheme{index}"} for index in range(1000)]},
    ],
    ids=["of structure", "of meaning"],
)
def test_a_thousand_problems_are_cut_short(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="more than 200") as error:
        parse_recipe(json.dumps({**RECIPE, **change}))
    assert len(error.value.problems) <= 202


def test_validation_is_imported_without_torch() -> None:
    program = (
        f"import sys, {validation.__name__}; "
        "print(*[m for m in ('torch', 'numpy', 'jsonschema', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == ""
