"""``quantrecipe diff``: exit codes, how it reads, and what is in its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import tensor

from quantrecipe.cli.diff import diff
from quantrecipe.converter import convert
from tests.converter.making import Tensors, parsed, recipe, save, small

CODES = torch.arange(-20, 20, dtype=torch.int8).reshape(4, 10)
SCALES = tensor([0.5, 1.0, 2.0, 0.25])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, and conversions of it that are the same, stored otherwise and other numbers."""
    folder = tmp_path_factory.mktemp("made")
    small(folder / "source" / "m.safetensors")
    fp8 = {"format": "float8_e4m3fn", "granularity": "channel"}
    for name, document in {
        "int8": recipe(),
        "moved": recipe(target="transformerlab"),
        "fp8": recipe(fp8, target="fp8-scaled"),
    }.items():
        convert(parsed(document), folder / "source", folder / name)
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(diff, [str(argument) for argument in arguments])


def layers(count: int) -> Tensors:
    found: Tensors = {}
    for layer in range(count):
        found[f"layers.{layer}.w.weight"] = CODES.clone()
        found[f"layers.{layer}.w.weight_scale"] = SCALES.clone()
        found[f"layers.{layer}.norm.weight"] = torch.ones(4)
    return found


def test_the_same(made: Path) -> None:
    result = invoke(made / "int8", made / "int8")
    assert result.exit_code == 0
    verdict, empty, a, b = result.stdout.splitlines()
    assert verdict == "same: 2 modules and 1 tensor, bit for bit"
    assert empty == ""
    assert a.split() == f"A {made}/int8 int8-scaled 1 file, 1.08 KB made by small".split()
    assert b.startswith("B  ")
    assert result.stderr == ""


def test_the_same_stored_otherwise_is_no_failure(made: Path) -> None:
    result = invoke(made / "int8", made / "moved")
    assert result.exit_code == 0
    verdict, *_ = result.stdout.splitlines()
    assert verdict == "moved: the same numbers, stored otherwise: 2 modules and 1 tensor"
    assert "moved    a            1  int8 channel  names, scale shape" in result.stdout
    assert "metadata quantrecipe: the recipe small (" in result.stdout
    assert invoke(made / "int8", made / "moved", "--fail-on", "moved").exit_code == 1


def test_other_numbers_are_measured(made: Path) -> None:
    result = invoke(made / "source", made / "int8")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == ("different: 2 modules requantized, 1 tensor moved; worst 42.70 dB (a)")
    (row,) = [line for line in lines if line.startswith("requantized  a ")]
    assert " ".join(row.split()) == "requantized a 1 bfloat16 -> int8 channel 42.70 0.4922"
    title = lines.index("worst first:")
    assert " ".join(lines[title + 1].split()) == "name SQNR dB largest error in scales at"
    assert lines[title + 2].split()[:2] == ["a", "42.70"]


def test_what_differs_alike_is_one_line(tmp_path: Path) -> None:
    a = save(tmp_path / "a.safetensors", layers(12))
    changed = layers(12)
    for layer in range(4, 12):
        changed[f"layers.{layer}.w.weight"][1, 2] += 1
    changed["layers.3.norm.weight"][0] = 2
    b = save(tmp_path / "b.safetensors", changed)
    text = invoke(a, b).stdout
    assert "requantized  layers.{4..11}.w      8  int8 channel" in text
    assert "changed      layers.3.norm.weight  1  float32" in text
    assert text.startswith(
        "different: 1 tensor changed, 8 modules requantized; 4 modules and 11 tensors the same;"
    )
    assert "layers.{0..3}.w" not in text
    assert "same         layers.{0..3}.w " in invoke(a, b, "--all").stdout


def test_as_few_of_the_worst_as_asked_for(made: Path) -> None:
    one = invoke(made / "source", made / "int8", "--worst", "1").stdout
    assert "the 1 worst of 2:" in one
    none = invoke(made / "source", made / "int8", "--worst", "0").stdout
    assert "worst of" not in none
    assert "worst first" not in none


@pytest.mark.parametrize(
    ("other", "options", "code"),
    [
        ("fp8", (), 1),
        ("fp8", ("--allow", "requantized"), 0),
        ("fp8", ("--allow", "requantized", "--min-sqnr", "20"), 0),
        ("fp8", ("--allow", "requantized", "--min-sqnr", "60"), 1),
        ("fp8", ("--fail-on", "changed"), 0),
        ("fp8", ("--fail-on", "changed", "--min-sqnr", "60"), 1),
        ("fp8", ("--fail-on", "changed", "--fail-on", "requantized"), 1),
        ("int8", ("--fail-on", "any"), 0),
        ("moved", ("--fail-on", "any"), 1),
        ("moved", ("--fail-on", "any", "--allow", "moved"), 1),  # the metadata names the recipe
        ("moved", ("--fail-on", "any", "--allow", "moved", "--allow", "metadata"), 0),
        ("moved", ("--fail-on", "metadata"), 1),
        ("moved", ("--fail-on", "config"), 0),
        ("moved", ("--part", "model=model"), 0),
        ("source", ("--fail-on", "only-in-a"), 0),
    ],
)
def test_exit_codes(made: Path, other: str, options: tuple[str, ...], code: int) -> None:
    result = invoke(made / "int8", made / other, *options)
    assert result.exit_code == code, result.output
    failed = json.loads(invoke(made / "int8", made / other, *options, "--json").stdout)["failed"]
    assert failed == bool(code)


def test_what_is_allowed_is_told(made: Path) -> None:
    options = ("--allow", "requantized", "--min-sqnr")
    assert "; all of it allowed\n" in invoke(made / "int8", made / "fp8", *options, "20").stdout
    result = invoke(made / "int8", made / "fp8", *options, "60").stdout
    assert "; 2 below 60 dB\n" in result
    assert result.count("too low") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Missing argument 'B'"),
        (("b", "--part", "model"), "give A=B"),
        (("b", "--part", "=b"), "give A=B"),
        (("b", "--part", "x=y", "--part", "x=z"), "names 'x' of A twice"),
        (("b", "--fail-on", "same"), "'same' is not one of"),
        (("b", "--min-sqnr", "30"), "give --allow requantized"),
        (("b", "--worst", "-1"), "Invalid value for '--worst'"),
    ],
)
def test_usage(options: tuple[str, ...], message: str) -> None:
    result = invoke("a", *options)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("json_too", [False, True])
def test_what_cannot_be_opened(made: Path, tmp_path: Path, json_too: bool) -> None:
    result = invoke(made / "int8", tmp_path / "nothing", *(["--json"] if json_too else []))
    if json_too:
        assert result.exit_code == 1
        (problem,) = json.loads(result.stdout)["problems"]
        assert problem["kind"] == "missing-source"
    else:
        assert type(result.exception).__name__ == "InvalidInput"


def test_parts_are_a_column_where_there_are_several(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        for part in ("one", "two"):
            save(tmp_path / name / part / "m.safetensors", {"x": torch.full((2,), value)})
    result = invoke(tmp_path / "a", tmp_path / "b")
    assert "; worst 0.00 dB (one: x)\n" in result.stdout
    assert "changed  one, two  x     2  float32       0.00" in result.stdout
    save(tmp_path / "b" / "two" / "m.safetensors", {"x": torch.ones(2)})
    text = invoke(tmp_path / "a", tmp_path / "b").stdout
    assert "changed  one   x     1  float32       0.00" in text


def test_a_long_table_is_cut(tmp_path: Path) -> None:
    names = [f"{letter}{other}" for letter in "abcdefghi" for other in "abcdefghi"]
    paths = [
        save(tmp_path / f"{n}.safetensors", {name: torch.full((1,), n) for name in names})
        for n in (1.0, 2.0)
    ]
    assert "... and 21 more rows (--all shows them)" in invoke(*paths).stdout
    assert "more rows" not in invoke(*paths, "--all").stdout


def golden(folder: Path) -> dict[str, Any]:
    def side(name: str, path: str) -> dict[str, Any]:
        return {
            "path": f"{folder}/{name}",
            "files": 1,
            "bytes": (folder / name).stat().st_size,
            "recipe": None,
            "parts": [{"name": path, "location": ".", "layout": "int8-scaled"}],
        }

    def stored(
        name: str, roles: dict[str, tuple[str, str, list[int]]], file: str
    ) -> dict[str, Any]:
        weight = {
            "format": "int8",
            "granularity": "channel",
            "scale_dtype": "float32",
            "symmetric": True,
        }
        return {
            "part": "model",
            "name": name,
            "shape": [4, 10] if "tensor" not in roles else roles["tensor"][2],
            "weight": weight if "weight" in roles else None,
            "tensors": {
                role: {"name": each, "dtype": dtype, "shape": shape, "file": file}
                for role, (each, dtype, shape) in roles.items()
            },
        }

    codes = {
        "weight": ("w.weight", "int8", [4, 10]),
        "weight_scale": ("w.weight_scale", "float32", [4]),
    }
    moved = codes | {"weight_scale": ("w.weight_scale", "float32", [4, 1])}
    plain = {"part": "model", "failed": False, "rounding": None, "distance": None}
    return {
        "version": 1,
        "verdict": "different",
        "failed": True,
        "fail_on": ["dtype", "requantized", "changed", "only-in-a", "only-in-b"],
        "min_sqnr_db": None,
        "a": side("a.safetensors", "model"),
        "b": side("b.safetensors", "model"),
        "parts": [{"a": "model", "b": "model", "names_of": None}],
        "counts": {
            "modules": {
                "same": 0,
                "moved": 1,
                "dtype": 0,
                "requantized": 0,
                "changed": 0,
                "only-in-a": 0,
                "only-in-b": 0,
            },
            "tensors": {
                "same": 1,
                "moved": 0,
                "dtype": 1,
                "requantized": 0,
                "changed": 1,
                "only-in-a": 0,
                "only-in-b": 1,
            },
        },
        "entries": [
            {
                **plain,
                "kind": "module",
                "name": "w",
                "verdict": "moved",
                "details": ["scale shape"],
                "a": stored("w", codes, "a.safetensors"),
                "b": stored("w", moved, "b.safetensors"),
            },
            {
                **plain,
                "kind": "tensor",
                "name": "changed",
                "verdict": "changed",
                "failed": True,
                "details": [],
                "distance": {
                    "exact": False,
                    "finite": True,
                    "sqnr_db": 10.0,
                    "worst_error": 1.0,
                    "at": [1],
                    "in_scales": None,
                },
                "a": stored("changed", {"tensor": ("changed", "float32", [2])}, "a.safetensors"),
                "b": stored("changed", {"tensor": ("changed", "float32", [2])}, "b.safetensors"),
            },
            {
                **plain,
                "kind": "tensor",
                "name": "new",
                "verdict": "only-in-b",
                "failed": True,
                "details": [],
                "a": None,
                "b": stored("new", {"tensor": ("new", "int64", [1])}, "b.safetensors"),
            },
            {
                **plain,
                "kind": "tensor",
                "name": "same",
                "verdict": "same",
                "details": [],
                "a": stored("same", {"tensor": ("same", "float32", [])}, "a.safetensors"),
                "b": stored("same", {"tensor": ("same", "float32", [])}, "b.safetensors"),
            },
            {
                **plain,
                "kind": "tensor",
                "name": "wider",
                "verdict": "dtype",
                "failed": True,
                "details": [],
                "rounding": "lossless",
                "a": stored("wider", {"tensor": ("wider", "float16", [1])}, "a.safetensors"),
                "b": stored("wider", {"tensor": ("wider", "float32", [1])}, "b.safetensors"),
            },
        ],
        "metadata": [{"where": "metadata", "key": "format", "a": "pt", "b": None}],
        "config": [],
        "notes": [],
    }


def test_json_is_what_it_is_documented_to_be(tmp_path: Path) -> None:
    same = {"same": tensor(1.0), "changed": tensor([1.0, 3.0]), "wider": tensor([1.0]).half()}
    other = same | {
        "changed": tensor([1.0, 4.0]),
        "wider": tensor([1.0]),
        "new": tensor([1]),
    }
    module = {"w.weight": CODES, "w.weight_scale": SCALES}
    a = save(tmp_path / "a.safetensors", module | same, {"format": "pt"})
    b = save(tmp_path / "b.safetensors", module | {"w.weight_scale": SCALES[:, None]} | other)
    result = invoke(a, b, "--json")
    assert result.exit_code == 1
    assert result.stderr == ""
    assert json.loads(result.stdout) == golden(tmp_path)


def test_json_has_no_infinities(tmp_path: Path) -> None:
    a = save(tmp_path / "a.safetensors", {"x": torch.zeros(2), "y": torch.ones(1)})
    b = save(tmp_path / "b.safetensors", {"x": torch.ones(2), "y": tensor([float("inf")])})

    def refuse(text: str) -> None:
        raise AssertionError(text)

    found = json.loads(invoke(a, b, "--json").stdout, parse_constant=refuse)
    zero, infinite = (entry["distance"] for entry in found["entries"])
    assert (zero["sqnr_db"], zero["finite"], zero["worst_error"]) == (None, True, 1.0)
    assert (infinite["sqnr_db"], infinite["finite"], infinite["worst_error"]) == (None, False, None)
