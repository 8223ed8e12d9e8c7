"""Converters of other projects: found by entry point, held to the plan."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from quantrecipe.converter import convert, converter_names, find_converter, plan
from quantrecipe.schema.problems import InvalidInput, OutputError
from tests.converter.making import parsed, read_lock, recipe, result_of, small, tree, weight_spec

THIRD_PARTY = Path(__file__).with_name("third_party")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``pip install`` would do: a package and its dist-info on the path."""
    monkeypatch.syspath_prepend(str(THIRD_PARTY))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    small(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_they_are_listed_beside_our_own() -> None:
    assert {"streaming", "reference", "numpy"} <= set(converter_names())
    assert find_converter("numpy").version == "1.2"


def test_one_that_works_writes_the_same_bytes(tmp_path: Path, source: Path) -> None:
    made = parsed(recipe())
    ours = convert(made, source, tmp_path / "ours", converter="reference").out
    theirs = convert(made, source, tmp_path / "theirs", converter="numpy").out
    assert result_of(theirs) == result_of(ours)
    assert read_lock(theirs)["converter"] == {"name": "numpy", "version": "1.2"}


@pytest.mark.parametrize(
    ("weight", "lacks"),
    [
        (weight_spec("int8", "tensor"), "format int8 by tensor"),
        (weight_spec("float8_e4m3fn"), "format float8_e4m3fn by channel"),
    ],
    ids=["granularity", "format"],
)
def test_one_that_cannot_is_refused_while_planning_and_says_who_could(
    tmp_path: Path, source: Path, weight: dict[str, object], lacks: str
) -> None:
    target = "int8-scaled" if weight["format"] == "int8" else "fp8-scaled"
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(weight, target=target), indent=2))
    with pytest.raises(InvalidInput) as error:
        plan(path, source, converter="numpy")
    (problem,) = error.value.problems
    assert problem.kind == "converter-lacks"
    assert problem.message == f"converter 'numpy' has no {lacks}"
    assert problem.hint == "Could do it: reference, streaming (--converter)."
    assert (problem.pointer, problem.file) == ("/schemes/all/weight/format", str(path))
    assert problem.line is not None


@pytest.mark.parametrize(
    ("converter", "says"),
    [
        ("forgetful", "model: a: model.safetensors [a.weight]: 96 bytes were never written"),
        ("hasty", "[norm.weight]: 1 bytes were never written"),
        ("outside", "[a.weight]: 2 bytes too many"),
        ("stray", "model: a: writes 'smoothing', and stores weight, weight_scale, bias only"),
        ("blind", "no error measured for model: a, model: b"),
    ],
)
def test_one_that_misbehaves_publishes_nothing(
    tmp_path: Path, source: Path, converter: str, says: str
) -> None:
    before = tree(tmp_path)
    with pytest.raises(OutputError) as error:
        convert(parsed(recipe()), source, tmp_path / "out", converter=converter)
    assert repr(converter) in str(error.value)
    assert "nothing was published" in str(error.value)
    assert says in str(error.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("gone", "broken-entry-point", "No module named 'someones_tools.nowhere'"),
        ("shapeless", "not-a-converter", "lacks a name, a version, capabilities"),
        ("nunpy", "unknown-converter", "Did you mean 'numpy'?"),
    ],
)
def test_one_that_is_none_is_named(name: str, kind: str, says: str) -> None:
    with pytest.raises(InvalidInput) as error:
        find_converter(name)
    assert error.value.problems[0].kind == kind
    assert says in str(error.value)


def test_without_their_package_they_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(THIRD_PARTY)])
    assert "numpy" not in converter_names()
