"""``recipes``, ``layouts``, ``formats``: what is known by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from quantrecipe.cli.format_facts import FormatFacts, format_facts, format_names
from quantrecipe.cli.tables import table
from quantrecipe.schema.layout import Layout
from quantrecipe.schema.problems import InvalidInput, Problem, did_you_mean
from quantrecipe.schema.registry import (
    LAYOUTS,
    NAMES,
    named_layout,
    named_names,
    recipe_names,
    recipe_text,
)

_JSON_HELP = "Machine-readable."


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help=_JSON_HELP)
def recipes(name: str | None, as_json: bool) -> None:
    """List the built-in recipes, or print the one called NAME."""
    if name is not None:
        # As it was written: a digest is of a recipe's text, and people read it.
        click.echo(recipe_text(name).rstrip("\n"))
        return
    documents = {each: json.loads(recipe_text(each)) for each in recipe_names()}
    if as_json:
        click.echo(_pretty(_listed(documents)))
        return
    click.echo(table(_rows(documents), ("RECIPE", "DESCRIPTION")))


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help=_JSON_HELP)
def layouts(name: str | None, as_json: bool) -> None:
    """List the known layouts and names of modules, or print the one called NAME."""
    if name is not None:
        document = named_names(name) if name in NAMES and name not in LAYOUTS else _layout(name)
        click.echo(_pretty(document.to_json_value()))
        return
    known = {each: named_layout(each).to_json_value() for each in LAYOUTS}
    names = {each: named_names(each).to_json_value() for each in NAMES}
    if as_json:
        click.echo(_pretty([*_listed(known), *_listed(names)]))
        return
    click.echo(table(_rows(known), ("LAYOUT", "DESCRIPTION")))
    click.echo()
    click.echo(table(_rows(names), ("NAMES", "DESCRIPTION")))


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        known = [*LAYOUTS, *NAMES]
        message = f"no layout and no names are called {name!r}"
        raise InvalidInput(Problem("unknown-layout", message, did_you_mean(name, known)))
    return named_layout(name)


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help=_JSON_HELP)
def formats(name: str | None, as_json: bool) -> None:
    """List the numeric formats, or describe the one called NAME."""
    known = format_names()
    if name is not None and name not in known:
        raise InvalidInput(
            Problem("unknown-format", f"no format is called {name!r}", did_you_mean(name, known))
        )
    if name is not None:
        facts = format_facts(name)
        click.echo(_pretty(facts.as_dict()) if as_json else _description(facts))
        return
    every = [format_facts(each) for each in known]
    if as_json:
        click.echo(_pretty([facts.as_dict() for facts in every]))
        return
    rows = [
        (
            facts.name,
            facts.bits,
            ", ".join(each.name for each in facts.granularities) or "-",
            facts.bound,
        )
        for facts in every
    ]
    headers = ("FORMAT", "BITS", "A SCALE FOR EACH", "READ BACK WITHIN")
    click.echo(table(rows, headers, "lrll"))


def first_sentence(text: str) -> str:
    """The text up to the end of its first sentence."""
    head, stop, _ = text.partition(". ")
    return head + "." if stop else text


def _listed(documents: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "kind": document["kind"],
            "name": name,
            "description": document.get("description", ""),
        }
        for name, document in documents.items()
    ]


def _rows(documents: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [
        (name, first_sentence(str(document.get("description", ""))))
        for name, document in documents.items()
    ]


def _description(facts: FormatFacts) -> str:
    lines = [f"{facts.name}: {facts.summary}", ""]
    rows = [("size", f"{facts.bits} bits a number"), ("stored", facts.stored)]
    rows += [("a scale for each", f"{g.name}: {g.meaning}") for g in facts.granularities]
    if facts.scale_dtypes:
        rows.append(("scales in", ", ".join(facts.scale_dtypes)))
    rows.append(("read back within", facts.bound))
    return "\n".join([*lines, table(rows)])


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
