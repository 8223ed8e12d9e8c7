"""`validate`, `schema` and `migrate`: what they print, and how they exit."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from quantrecipe.cli.reporters import REPORTERS, FileResult
from quantrecipe.schema.migrations import CHAINS, Chain
from quantrecipe.schema.placement import encode_header
from quantrecipe.schema.problems import InvalidInput, OutputError, Problem
from quantrecipe.schema.published import SCHEMAS, published_text
from quantrecipe.schema.tensors import OutputTensor

# By import_module: the package may offer a command under the name of its module.
validate_module = importlib.import_module("quantrecipe.cli.validate")
migrate_module = importlib.import_module("quantrecipe.cli.migrate")
schema_module = importlib.import_module("quantrecipe.cli.schema_command")

VALID = {
    "kind": "recipe",
    "version": 1,
    "name": "small",
    "source": {"layout": "plain"},
    "schemes": {"a": {"weight": {"format": "int8", "granularity": "channel"}}},
    "rules": [{"modules": ["**"], "scheme": "a"}],
    "target": {"layout": "int8-scaled"},
}
INVALID = {**VALID, "rules": [{"modules": ["**"], "scheme": "aa"}]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with recipes in it, which is also where the command runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "deep").mkdir(parents=True)
    for name, value in {"good": VALID, "bad": INVALID, "deep/good": VALID}.items():
        path = tmp_path / "recipes" / f"{name}.json"
        path.write_text(json.dumps(value, indent=2), "utf-8")
    return tmp_path


def invoke(module: ModuleType, name: str, *arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(getattr(module, name), list(arguments), input=text)


def validate(*arguments: str, text: str | None = None) -> Result:
    return invoke(validate_module, "validate", *arguments, text=text)


def test_a_valid_recipe(folder: Path) -> None:
    result = validate("recipes/good.json")
    assert result.exit_code == 0
    assert result.stdout == "recipes/good.json: valid recipe\n1 file, all valid\n"


def test_every_problem_is_one_line_and_a_hint(folder: Path) -> None:
    result = validate("recipes/good.json", "recipes/bad.json")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "recipes/good.json: valid recipe",
        "recipes/bad.json:9:5: no rule uses the scheme 'a' (/schemes/a)",
        "  Remove it, or give it to a rule.",
        "recipes/bad.json:21:17: no scheme is called 'aa' (/rules/0/scheme)",
        "  Did you mean 'a'?",
        "2 files, 1 invalid, 2 problems",
    ]


@pytest.mark.parametrize(
    ("paths", "files"),
    [
        (["recipes/*.json"], ["recipes/bad.json", "recipes/good.json"]),
        (["recipes/**/good.json"], ["recipes/deep/good.json", "recipes/good.json"]),
        (["recipes/good.json", "recipes/*.json"], ["recipes/good.json", "recipes/bad.json"]),
        (["recipes/deep*"], None),
        (["recipes"], None),
        (["recipes/*.yaml"], None),
        (["recipes/absent.json"], None),
        ([], None),
    ],
)
def test_paths_and_patterns(folder: Path, paths: list[str], files: list[str] | None) -> None:
    result = validate(*paths, "--format", "json")
    if files is None:
        assert result.exit_code == 2
        assert not result.stdout
    else:
        assert [entry["file"] for entry in json.loads(result.stdout)["files"]] == files


def test_a_folder_is_told_how_to_name_its_files(folder: Path) -> None:
    assert "recipes/*.json" in validate("recipes").stderr.replace("\\", "/")


def test_a_name_with_the_characters_of_a_pattern(folder: Path) -> None:
    (folder / "[1].json").write_text(json.dumps(VALID), "utf-8")
    assert validate("[1].json").exit_code == 0


def test_standard_input() -> None:
    result = validate("-", text='{"kind": "recipe",')
    assert result.exit_code == 1
    assert result.stdout.startswith("<stdin>:1:19: ")


def test_a_file_that_is_no_document_is_a_problem_among_others(folder: Path) -> None:
    (folder / "noise.json").write_bytes(b"\xff\xfe")
    result = validate("noise.json", "recipes/good.json", "--format", "json")
    assert result.exit_code == 1
    first, second = json.loads(result.stdout)["files"]
    assert (first["valid"], first["kind"], second["valid"]) == (False, None, True)
    assert first["problems"][0]["kind"] == "not-utf-8"


def test_layouts_are_validated_too(folder: Path) -> None:
    layout = {
        "kind": "layout",
        "version": 1,
        "name": "mine",
        "modules": {"plain": {"weight": {"name": "{module}.weight"}}},
        "others": {"name": "{tensor}"},
    }
    (folder / "layout.json").write_text(json.dumps(layout), "utf-8")
    assert validate("layout.json").stdout.startswith("layout.json: valid layout\n")


def test_json_has_every_field_of_a_problem(folder: Path) -> None:
    value = json.loads(validate("recipes/bad.json", "--format", "json").stdout)
    assert value["valid"] is False
    assert value["files"][0]["problems"][1] == {
        "kind": "unknown-scheme",
        "message": "no scheme is called 'aa'",
        "hint": "Did you mean 'a'?",
        "file": "recipes/bad.json",
        "line": 21,
        "column": 17,
        "pointer": "/rules/0/scheme",
    }


HOSTILE = FileResult(
    "a b,c:d%.json",
    None,
    (
        Problem("kind", "100%\r\nsure", "really\n::error::no", line=3, column=4, pointer="/é"),
        Problem("other", "no place", tensor="w"),
    ),
)


def test_github_commands_cannot_be_broken_out_of() -> None:
    first, second, summary = REPORTERS["github"]([HOSTILE]).splitlines()
    assert first == (
        "::error file=a b%2Cc%3Ad%25.json,line=3,col=4,title=kind::"
        "100%25%0D%0Asure (/é)%0Areally%0A::error::no"
    )
    assert second == "::error file=a b%2Cc%3Ad%25.json,title=other::no place [w]"
    assert summary == "1 file, 1 invalid, 2 problems"


def test_sarif_has_what_code_scanning_needs() -> None:
    log = json.loads(REPORTERS["sarif"]([HOSTILE, FileResult("good.json", "recipe", ())]))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    assert set(run) == {"tool", "columnKind", "artifacts", "results"}
    assert run["columnKind"] == "unicodeCodePoints"
    driver = run["tool"]["driver"]
    assert driver["name"] == "quantrecipe"
    for result in run["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] == "error"
        assert result["message"]["text"]
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert re.fullmatch(r"[A-Za-z0-9%/._~-]+", uri)
    first, second = run["results"]
    region = first["locations"][0]["physicalLocation"]["region"]
    assert region == {"startLine": 3, "startColumn": 4}
    assert first["locations"][0]["logicalLocations"] == [{"fullyQualifiedName": "/é"}]
    assert "region" not in second["locations"][0]["physicalLocation"]


def test_sarif_without_problems_still_has_results() -> None:
    log = json.loads(REPORTERS["sarif"]([FileResult("good.json", "recipe", ())]))
    assert log["runs"][0]["results"] == []


@pytest.mark.parametrize(
    ("modules", "code", "said"),
    [
        ("**.lin", 0, "all valid"),
        ("**.line", 1, "pattern '**.line' takes no module"),
        ("a.norm", 1, "only two-dimensional weights are modules"),
    ],
    ids=["fits", "takes nothing", "no module"],
)
def test_rules_are_held_against_the_headers_of_a_checkpoint(
    folder: Path, modules: str, code: int, said: str
) -> None:
    recipe = json.loads((folder / "recipes/good.json").read_text("utf-8"))
    recipe["rules"][0]["modules"] = [modules]
    (folder / "recipes/rules.json").write_text(json.dumps(recipe), "utf-8")
    (folder / "model").mkdir()
    tensors = [
        OutputTensor("a.lin.weight", "float32", (2, 2)),
        OutputTensor("a.norm.weight", "float32", (2,)),
    ]
    payload = bytes(sum(tensor.nbytes for tensor in tensors))
    (folder / "model/model.safetensors").write_bytes(encode_header(tensors, {}) + payload)
    result = validate("recipes/rules.json", "--checkpoint", "model")
    assert result.exit_code == code
    assert said in result.stdout


def test_a_checkpoint_without_weights_is_a_problem_of_the_recipe_that_is_checked_against_it(
    folder: Path,
) -> None:
    (folder / "model").mkdir()
    result = validate("recipes/good.json", "--checkpoint", "model")
    assert result.exit_code == 1
    assert "model" in result.stdout


def test_a_checkpoint_that_does_not_exist_is_a_matter_of_usage(folder: Path) -> None:
    assert validate("recipes/good.json", "--checkpoint", "absent").exit_code == 2


def test_a_recipe_is_validated_without_torch(folder: Path) -> None:
    program = (
        "import sys\n"
        "from quantrecipe.cli.validate import validate\n"
        "validate.main(['recipes/good.json'], standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'jsonschema', 'yaml'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def schema(*arguments: str) -> Result:
    return invoke(schema_module, "schema", *arguments)


def test_schema_lists_prints_and_writes(folder: Path) -> None:
    listed = schema().stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(SCHEMAS)
    assert schema("recipe").stdout == published_text("recipe")
    assert schema("recipe", "--write").stdout == "recipe.schema.json\n"
    assert (folder / "recipe.schema.json").read_text("utf-8") == published_text("recipe")
    assert len(schema("--write", "new/folder").stdout.splitlines()) == len(SCHEMAS)
    assert (folder / "new" / "folder" / "lock.schema.json").is_file()


def test_schema_of_an_unknown_kind_and_into_a_file(folder: Path) -> None:
    assert schema("recpie").exit_code == 2
    (folder / "taken").write_text("", "utf-8")
    assert schema("recipe", "--write", "taken").exit_code == 2
    assert isinstance(schema("recipe", "--write", "taken/below").exception, OutputError)


def migrate(*arguments: str, text: str | None = None) -> Result:
    return invoke(migrate_module, "migrate", *arguments, text=text)


def test_migrate_prints_a_current_document_as_it_is(folder: Path) -> None:
    result = migrate("recipes/good.json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == VALID
    assert "version 1 is the current one" in result.stderr


def test_migrate_leaves_a_current_file_alone(folder: Path) -> None:
    path = folder / "recipes" / "good.json"
    path.write_text(json.dumps(VALID), "utf-8")
    before = path.stat()
    assert migrate("recipes/good.json", "--in-place").exit_code == 0
    assert path.stat() == before


def test_migrate_rewrites_an_older_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(old: dict[str, Any]) -> dict[str, Any]:
        return {**old, "version": 1}

    recipe: Chain = CHAINS["recipe"]
    chain = replace(recipe, steps={0: step}, checks={**recipe.checks, 0: lambda value: ()})
    monkeypatch.setattr(
        migrate_module, "migrate_value", lambda value: _migrate(value, {"recipe": chain})
    )
    path = folder / "old.json"
    path.write_text(json.dumps({**VALID, "version": 0}), "utf-8")
    result = migrate("old.json", "--in-place")
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text("utf-8")) == VALID
    assert sorted(entry.name for entry in folder.iterdir()) == ["old.json", "recipes"]


def _migrate(value: Any, chains: dict[str, Chain]) -> dict[str, Any]:
    module = importlib.import_module("quantrecipe.schema.migrations")
    migrated: dict[str, Any] = module.migrate(value, chains)
    return migrated


def test_migrate_locates_what_is_wrong(folder: Path) -> None:
    (folder / "new.json").write_text('{"kind": "recipe",\n "version": 7}', "utf-8")
    error = migrate("new.json").exception
    assert isinstance(error, InvalidInput)
    (problem,) = error.problems
    assert (problem.file, problem.line, problem.column) == ("new.json", 2, 13)


@pytest.mark.parametrize("file", ["-", "recipe.yaml"])
def test_migrate_in_place_takes_a_json_file(file: str) -> None:
    assert migrate(file, "--in-place").exit_code == 2
