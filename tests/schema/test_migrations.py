"""Older documents, one version at a time: shown with versions that never were."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest

from quantrecipe.schema.migrations import CHAINS, Chain, MigrationError, Step, migrate
from quantrecipe.schema.problems import InvalidInput, Problem
from quantrecipe.schema.structure import MODELS, VERSIONS, structure_problems

RECIPE: dict[str, Any] = {
    "kind": "recipe",
    "version": 1,
    "name": "small",
    "source": {"layout": "plain"},
    "schemes": {},
    "rules": [],
    "target": {"layout": "plain"},
}
OLD: dict[str, Any] = {
    "kind": "recipe",
    "version": 0,
    "title": "small",
    "from": {"layout": "plain"},
    "to": {"layout": "plain"},
}


def upgrade(old: dict[str, Any]) -> dict[str, Any]:
    """Changes what it is given, as a careless step would."""
    old["version"] = 1
    old["name"], old["source"], old["target"] = old.pop("title"), old.pop("from"), old.pop("to")
    return {**old, "schemes": {}, "rules": []}


def check_old(value: Any) -> tuple[Problem, ...]:
    known = {"kind", "version", "title", "from", "to"}
    unknown = [
        Problem("unknown-field", name, pointer=f"/{name}") for name in value if name not in known
    ]
    missing = [Problem("missing-field", name, pointer=f"/{name}") for name in known - set(value)]
    return (*unknown, *missing)


def chains(step: Step = upgrade) -> Mapping[str, Chain]:
    def current(value: Any) -> tuple[Problem, ...]:
        return structure_problems(value, "recipe")

    return {"recipe": Chain("recipe", 1, {0: step}, {0: check_old, 1: current})}


def test_an_older_document_is_brought_up_to_date() -> None:
    before = copy.deepcopy(OLD)
    assert migrate(OLD, chains()) == RECIPE
    assert before == OLD


def test_a_current_document_comes_back_as_a_copy() -> None:
    migrated = migrate(RECIPE, chains())
    assert migrated == RECIPE
    assert migrated["source"] is not RECIPE["source"]


def test_versions_are_passed_through_one_at_a_time() -> None:
    seen: list[int] = []

    def step(old: dict[str, Any]) -> dict[str, Any]:
        seen.append(old["version"])
        return {**old, "version": old["version"] + 1}

    def check(value: Any) -> tuple[Problem, ...]:
        seen.append(-value["version"])
        return ()

    chain = Chain("layout", 3, {1: step, 2: step}, {1: check, 2: check, 3: check})
    assert migrate({"kind": "layout", "version": 1}, {"layout": chain})["version"] == 3
    assert seen == [-1, 1, -2, 2, -3]


def test_what_does_not_hold_to_its_own_version_is_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        migrate({**OLD, "colour": "red"}, chains())
    assert [(p.kind, p.pointer) for p in caught.value.problems] == [("unknown-field", "/colour")]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda old: old, "ended at version 0 instead of 1"),
        (lambda old: {**old, "version": 2}, "ended at version 2 instead of 1"),
        (lambda old: {**old, "version": True}, "ended at version True instead of 1"),
        (lambda old: {"kind": "recipe"}, "ended at version None instead of 1"),
        (lambda old: {**old, "version": 1}, "made what version 1 refuses"),
    ],
    ids=["unchanged", "too far", "a boolean", "no version", "not valid"],
)
def test_a_step_that_does_not_do_its_job_is_a_fault_of_ours(step: Step, message: str) -> None:
    with pytest.raises(MigrationError, match=message):
        migrate(OLD, chains(step))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"kind": "recipe", "version": 2}, "newer-version"),
        ({"kind": "recipe", "version": -1}, "unknown-version"),
        ({"kind": "recipe", "version": True}, "missing-field"),
        ({"kind": "recipe"}, "missing-field"),
        ({"version": 1}, "missing-field"),
        ({"kind": "recpie", "version": 1}, "unknown-value"),
        ([], "wrong-type"),
        (None, "wrong-type"),
    ],
)
def test_what_is_of_no_known_version_is_refused(value: Any, kind: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        migrate(value)
    (problem,) = caught.value.problems
    assert problem.kind == kind


def test_a_newer_version_says_what_to_do() -> None:
    with pytest.raises(InvalidInput, match=r"version 9 .* newest known here is 1(.|\n)*Update"):
        migrate({"kind": "lock", "version": 9})


@pytest.mark.parametrize(
    ("steps", "checks"),
    [({0: upgrade}, {1: check_old}), ({-1: upgrade}, {-1: check_old, 0: check_old, 1: check_old})],
    ids=["unchecked", "a gap"],
)
def test_a_chain_with_a_gap_is_refused(steps: dict[int, Step], checks: dict[int, Any]) -> None:
    with pytest.raises(ValueError, match="leave"):
        Chain("recipe", 1, steps, checks)


def test_every_kind_has_a_chain_to_its_current_version() -> None:
    assert CHAINS.keys() == MODELS.keys()
    assert {kind: chain.current for kind, chain in CHAINS.items()} == dict(VERSIONS)
