"""What is known by name, listed and printed."""

from __future__ import annotations

import json
from typing import Any, get_args

import click
import pytest
from click.testing import CliRunner

from quantrecipe.cli.format_facts import format_facts, format_names
from quantrecipe.cli.listings import first_sentence, formats, layouts, recipes
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.names import Names
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.registry import LAYOUTS, NAMES, recipe_names
from quantrecipe.schema.schemes import FormatName, ScaledFormatName


def run(command: click.Command, *arguments: str) -> str:
    return str(
        CliRunner().invoke(command, arguments, standalone_mode=False, catch_exceptions=False).output
    )


def run_json(command: click.Command, *arguments: str) -> Any:
    return json.loads(run(command, *arguments, "--json"))


COMMANDS = [
    pytest.param(recipes, recipe_names(), id="recipes"),
    pytest.param(formats, list(get_args(FormatName)), id="formats"),
]


@pytest.mark.parametrize(("command", "names"), COMMANDS)
def test_every_name_is_listed(command: click.Command, names: list[str]) -> None:
    lines = run(command).splitlines()
    assert [line.split()[0] for line in lines[1:]] == names
    assert [entry["name"] for entry in run_json(command)] == names


@pytest.mark.parametrize(("command", "names"), COMMANDS)
def test_unknown_names_are_refused_with_the_nearest(
    command: click.Command, names: list[str]
) -> None:
    for name in names[:2]:
        with pytest.raises(InvalidInput, match=f"Did you mean '{name}'") as caught:
            run(command, name + "x")
        assert caught.value.exit_code == 1


@pytest.mark.parametrize("name", recipe_names())
def test_a_named_recipe_is_printed_whole(name: str) -> None:
    printed = run(recipes, name)
    assert Recipe.model_validate_json(printed).name == name
    assert run(recipes, name, "--json") == printed


def test_layouts_and_names_are_listed_apart() -> None:
    first, second = (part.splitlines() for part in run(layouts).split("\n\n"))
    assert [line.split()[0] for line in first] == ["LAYOUT", *LAYOUTS]
    assert [line.split()[0] for line in second] == ["NAMES", *NAMES]
    listed = [(entry["kind"], entry["name"]) for entry in run_json(layouts)]
    assert listed == [*(("layout", name) for name in LAYOUTS), *(("names", name) for name in NAMES)]


@pytest.mark.parametrize("near", ["plain", "ideogram4-original"])
def test_what_is_neither_a_layout_nor_names_is_refused(near: str) -> None:
    with pytest.raises(InvalidInput, match=f"Did you mean '{near}'"):
        run(layouts, near + "x")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_whole(name: str) -> None:
    assert Names.model_validate_json(run(layouts, name)).name == name


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_named_layout_is_printed_whole(name: str) -> None:
    assert Layout.model_validate_json(run(layouts, name)).name == name


@pytest.mark.parametrize("name", format_names())
def test_a_format_is_described(name: str) -> None:
    facts = run_json(formats, name)
    assert facts == json.loads(json.dumps(format_facts(name).as_dict()))
    text = run(formats, name)
    assert facts["bound"] in text
    assert facts["summary"] in text
    scaled = name in get_args(ScaledFormatName)
    assert bool(facts["granularities"]) == bool(facts["scale_dtypes"]) == scaled


def test_facts_come_from_the_models() -> None:
    assert [each.name for each in format_facts("int8").granularities] == [
        "tensor", "channel", "group",
    ]  # fmt: skip
    assert [each.name for each in format_facts("float8_e5m2").granularities] == [
        "tensor", "channel", "block",
    ]  # fmt: skip
    assert format_facts("int8").scale_dtypes == ("float32", "float16", "bfloat16")
    assert all(g.meaning for name in format_names() for g in format_facts(name).granularities)


def test_first_sentence() -> None:
    assert first_sentence("One. Two.") == "One."
    assert first_sentence("scale 1.5 and no stop") == "scale 1.5 and no stop"
