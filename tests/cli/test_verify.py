"""``quantrecipe verify``: exit codes, what goes where, and how it reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from quantrecipe.cli.verify import verify
from quantrecipe.converter import convert
from quantrecipe.schema.lock import LOCK_NAME
from tests.converter.making import parsed, recipe, small


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    small(folder / "source" / "m.safetensors")
    convert(parsed(recipe()), folder / "source", folder / "out")
    return folder


@pytest.fixture
def damaged(tmp_path: Path, made: Path) -> Path:
    shutil.copytree(made / "out", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return tmp_path / "out"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(verify, [str(argument) for argument in arguments])


def test_the_verdict_comes_first(made: Path) -> None:
    result = invoke(made / "out")
    assert result.exit_code == 0
    assert result.stdout == "whole: 2 files, 6 tensors, 1.48 KB, all digests hold\n"
    assert result.stderr == ""


def test_quick_says_what_it_did_not_do(made: Path, damaged: Path) -> None:
    assert "no weight was hashed" in invoke(made / "out", "--quick").stdout
    assert invoke(damaged, "--quick").exit_code == 0


def test_against_a_source_lists_the_worst(made: Path) -> None:
    result = invoke(made / "out", "--against", made / "source", "--worst", "1")
    assert result.exit_code == 0
    verdict, nearest, title, header, row = result.stdout.splitlines()
    assert verdict.endswith(f"every number is what the recipe makes of {made / 'source'}")
    assert nearest.startswith("2 quantized modules: the largest error is 98.4% of its bound")
    assert title == "the 1 worst:"
    assert header.split() == [
        "part",
        "module",
        "weight",
        "SQNR",
        "dB",
        "error",
        "/",
        "scale",
        "of",
        "bound",
    ]
    assert row.split() == ["model", "a", "int8", "channel", "42.70", "0.4922", "98.4%"]


def test_no_table_where_none_is_asked_for(made: Path) -> None:
    result = invoke(made / "out", "--against", made / "source", "--worst", "0")
    assert len(result.stdout.splitlines()) == 2


def test_damage_is_named_and_exits_with_1(damaged: Path) -> None:
    result = invoke(damaged)
    assert result.exit_code == 1
    assert result.stdout.startswith("broken: 2 files, 6 tensors, 1.48 KB, 2 problems\n")
    assert f"{damaged / 'model.safetensors'} [" in result.stdout


def test_json_says_the_same(made: Path, damaged: Path) -> None:
    whole = json.loads(invoke(made / "out", "--json", "--against", made / "source").stdout)
    assert whole["whole"] is True
    assert whole["problems"] == []
    assert [module["name"] for module in whole["worst"]] == ["a", "b"]
    assert whole["worst"][0]["sqnr_db"] == pytest.approx(42.70, abs=0.01)
    result = invoke(damaged, "--json")
    assert result.exit_code == 1
    broken = json.loads(result.stdout)
    assert broken["whole"] is False
    assert {problem["kind"] for problem in broken["problems"]} == {"digest-mismatch"}
    assert "against" not in broken


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_folder_without_a_lock(tmp_path: Path, name: str) -> None:
    result = invoke(tmp_path / name)
    assert result.exit_code == 1
    assert result.stdout.startswith(f"broken: {tmp_path / name} has no lock that could be read\n")


def test_very_many_problems_are_cut_for_people_only(tmp_path: Path, made: Path) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    for number in range(30):
        (tmp_path / "out" / f"{number}.safetensors").write_bytes(b"")
    text = invoke(tmp_path / "out").stdout
    assert text.count("error:") == 20
    assert text.endswith("... and 10 more (--json shows all)\n")
    assert len(json.loads(invoke(tmp_path / "out", "--json").stdout)["problems"]) == 30


def test_usage(made: Path) -> None:
    assert invoke().exit_code == 2
    assert invoke(made / "out", "--worst", "-1").exit_code == 2


def test_an_unreadable_lock_is_no_verdict(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("{")
    result = invoke(tmp_path)
    assert result.exit_code == 1
    assert LOCK_NAME in result.stdout
