"""Recipes with chosen modules protected: they hold, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantrecipe.converter import open_recipe, plan
from quantrecipe.converter.planning import OpenRecipe
from quantrecipe.converter.ranking import Ranking, protect, rank_plan
from quantrecipe.converter.ranking.protecting import exact_pattern
from quantrecipe.schema.patterns import Patterns
from quantrecipe.schema.plan import Plan
from tests.converter.making import Json, parsed, save, weight_spec

NAMES = [f"layers.{index}.{name}" for index in range(3) for name in ("w1", "w2", "w3")]
USERS: Json = {"modules": ["layers.0.w3"], "dtype": "float32", "count": 1, "reason": "by hand"}

DOCUMENT: Json = {
    "kind": "recipe",
    "version": 1,
    "name": "small",
    "description": "keeps what it says",
    "source": {"layout": "plain"},
    "schemes": {"a": {"weight": weight_spec("int8")}, "b": {"weight": weight_spec("int8")}},
    "rules": [
        {"modules": ["layers.0.w1"], "scheme": "a"},
        {"modules": ["layers.{1,2}.w1", "layers.*.w2"], "scheme": "b", "count": 5},
        {"modules": ["**.w3"], "scheme": "b", "count": {"min": 2, "max": 9}},
        {"modules": ["elsewhere"], "scheme": "b", "count": {"min": 0}},
    ],
    "protected": [USERS],
    "target": {"layout": "int8-scaled"},
    "bounds": {"min_weight_sqnr_db": 1},
}

_Case = tuple[OpenRecipe, Plan, Ranking, Path]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> _Case:
    source = tmp_path_factory.mktemp("source") / "m.safetensors"
    generator = torch.Generator().manual_seed(0)
    save(source, {f"{name}.weight": torch.randn(6, 4, generator=generator) for name in NAMES})
    loaded = open_recipe(parsed(DOCUMENT))
    planned = plan(loaded, source)
    return loaded, planned, rank_plan(planned), source


@settings(max_examples=10)
@given(picked=st.sets(st.sampled_from([name for name in NAMES if name != "layers.0.w3"])))
def test_the_result_holds_and_protects_these_alone(case: _Case, picked: set[str]) -> None:
    loaded, planned, ranking, source = case
    chosen = [group for group in ranking.groups if group.modules[0][1] in picked]
    found = protect(loaded, planned, ranking, chosen)
    after = {module.name: module for module in plan(found, source).modules}
    for before in planned.modules:
        module = after[before.name]
        if before.name in picked:
            assert (module.disposition, module.weight.format) == ("protected", "bfloat16")
            assert module.reason is not None
            assert "SQNR" in module.reason
        else:
            assert (module.disposition, module.scheme) == (before.disposition, before.scheme)
            assert (module.weight, module.reason) == (before.weight, before.reason)
    value, given = found.recipe.to_json_value(), loaded.recipe.to_json_value()
    assert value["protected"][0] == USERS
    assert sum(entry["count"] for entry in value["protected"][1:]) == len(picked)
    changed = {"protected", "rules", "schemes"}
    assert {k: v for k, v in value.items() if k not in changed} == {
        k: v for k, v in given.items() if k not in changed
    }


def rules_after(case: _Case, *names: str) -> Any:
    loaded, planned, ranking, _ = case
    chosen = [group for group in ranking.groups if group.modules[0][1] in names]
    value = protect(loaded, planned, ranking, chosen).recipe.to_json_value()
    return value["rules"], sorted(value["schemes"])


def test_rules_keep_what_is_left_to_them(case: _Case) -> None:
    given = DOCUMENT["rules"]
    assert rules_after(case) == (given, ["a", "b"])
    assert rules_after(case, "layers.0.w1") == (given[1:], ["b"])
    second = given[1] | {"count": 4}
    assert rules_after(case, "layers.0.w2") == ([given[0], second, *given[2:]], ["a", "b"])
    second = {"modules": ["layers.*.w2"], "scheme": "b", "count": 3}
    assert rules_after(case, "layers.1.w1", "layers.2.w1")[0][1] == second
    third = given[2] | {"count": {"min": 1, "max": 9}}
    assert rules_after(case, "layers.2.w3")[0][2] == third


def test_all_can_be_protected(case: _Case) -> None:
    assert rules_after(case, *NAMES) == ([DOCUMENT["rules"][3]], ["b"])


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=9))
def test_names_are_matched_exactly(name: str) -> None:
    patterns = Patterns.compile([exact_pattern(name)])
    assert patterns.matches(name) == 0
    assert patterns.matches(name + "x") is None
    assert patterns.matches("x" + name) is None
