"""``quantrecipe calibrate``: what is run, what is written, and what is said of mistakes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from quantrecipe.cli.calibrate import calibrate
from quantrecipe.converter.calibration import open_statistics
from tests.converter.making import recipe

PROGRAM = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, timestep):
        return self.a(x) + self.b(x)

def run(calibration):
    print("running")
    torch.manual_seed(0)
    model = Net()
    with calibration.observe(model), torch.inference_mode():
        for time in (0.1, 0.8):
            model(torch.tensor([[1.0, 2.0, 3.0, 40.0]]), time)
    calibration.prompt("a cat")

class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.down(self.up(x))

class Runs:
    @staticmethod
    def folds(calibration):
        model = Blocks()
        with calibration.observe(model):
            model(torch.randn(2, 4))

    @staticmethod
    def in_pieces(calibration):
        model = Blocks()
        with calibration.observe(model):
            model.down(model.up(torch.randn(2, 4)))

    @staticmethod
    def none(calibration):
        pass

    @staticmethod
    def half(calibration):
        model = Net()
        with calibration.observe(model):
            model.a(torch.ones(1, 4))

    @staticmethod
    def fails(calibration):
        raise KeyError("lost")

number = 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder: a recipe, and a program whose module is called ``netrun``."""
    document = recipe(rules=[{"modules": ["{a,b}"], "scheme": "all"}])
    (tmp_path / "plain.json").write_text(json.dumps(document))
    document["schemes"]["all"]["smoothing"] = {
        "kind": "smoothquant",
        "alpha": 0.5,
        "apply": "online",
        "statistics": "there/statistics.safetensors",
    }
    (tmp_path / "recipe.json").write_text(json.dumps(document))
    document["schemes"]["all"]["smoothing"]["alpha"] = {"search": [0.3, 0.5]}
    (tmp_path / "search.json").write_text(json.dumps(document))
    (tmp_path / "netrun.py").write_text(PROGRAM)
    (tmp_path / "broken.py").write_text("import a_module_that_is_nowhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "netrun", raising=False)
    yield tmp_path
    sys.modules.pop("netrun", None)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(calibrate, [str(argument) for argument in arguments])


def calibrated(*arguments: object, run: str = "netrun:run", recipe: str = "recipe.json") -> Result:
    return invoke("--recipe", recipe, "--run", run, *arguments)


def test_the_file_that_the_recipe_names_is_written(folder: Path) -> None:
    result = calibrated("--timesteps", "0,0.5,1", "--tokens", 3)
    assert result.exit_code == 0, result.output
    assert "running" in result.stderr
    first, modules, siblings, _, title, headers, *rows = result.stdout.splitlines()
    path = Path("there", "statistics.safetensors")
    assert first == f"{path}: 1 samples, 2 timestep bins"
    assert modules == "modules: 2 of model"
    assert siblings.startswith("siblings: 1 ")
    assert title == "spikiest:"
    assert headers.split() == ["part", "module", "tokens", "largest", "max/median", "kurtosis"]
    assert [row.split()[:5] for row in rows] == [
        ["model", name, "2", "40", "16.0"] for name in ("a", "b")
    ]
    with open_statistics(path) as file:
        assert file.header.model == "small"
        assert file.header.reservoir == 3
        assert [each.samples for each in file.header.timesteps] == [1, 1]
        assert file.header.prompts_sha256 is not None


def test_json_and_merging(folder: Path) -> None:
    for name in ("x", "y"):
        assert calibrated("--out", f"{name}.safetensors", recipe="plain.json").exit_code == 0
    result = invoke("--merge", "x.safetensors", "y.safetensors", "--out", "z", "--json")
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["file"] == "z"
    assert found["samples"] == 2
    assert found["siblings"] == {"model": [["a", "b"]]}
    (a, b) = found["measured"]
    assert a | {"module": "b"} == b
    assert (a["tokens"], a["absmax"], a["max_to_median"]) == (4, 40, 16)
    with open_statistics("z") as file:
        assert file.header.samples == 2


def test_folds_are_proven_or_a_warning_says_how(folder: Path) -> None:
    document = json.loads(Path("recipe.json").read_text())
    document["schemes"]["all"]["smoothing"]["apply"] = "fold"
    document["folds"] = [{"modules": ["down"], "into": "up"}]
    document["rules"][0]["modules"] = ["down"]
    Path("fold.json").write_text(json.dumps(document))
    arguments = ["--out", "s.safetensors", "--force"]
    result = calibrated(*arguments, recipe="fold.json", run="netrun:Runs.folds")
    assert "\nfolds: 1 proven\n" in result.stdout
    result = calibrated(*arguments, recipe="fold.json", run="netrun:Runs.in_pieces")
    assert result.exit_code == 0
    assert "convert will refuse" in result.stdout
    assert "/folds/0: it was not proven on part 'model'" in result.stdout
    assert "calibration.prove_folds(model, run, part)" in result.stdout
    result = calibrated(*arguments, "--json", recipe="fold.json", run="netrun:Runs.in_pieces")
    (problem,) = json.loads(result.stdout)["unproven"]
    assert (problem["kind"], problem["pointer"]) == ("fold-unproven", "/folds/0")
    with open_statistics("s.safetensors") as file:
        assert file.header.folds == ()


def test_a_file_that_is_there_stays_and_nothing_runs(folder: Path) -> None:
    Path("s.safetensors").write_bytes(b"mine")
    result = calibrated("--out", "s.safetensors", run="netrun:Runs.fails")
    assert result.exit_code == 1
    assert "already holds s.safetensors" in str(result.exception)
    assert calibrated("--out", "s.safetensors", "--force").exit_code == 0


def test_modules_that_never_run(folder: Path) -> None:
    result = calibrated("--json", run="netrun:Runs.half")
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert (problem["kind"], problem["tensor"]) == ("never-called", "b")
    result = calibrated("--allow-uncalled", run="netrun:Runs.half")
    assert result.exit_code == 0
    assert "never called: 1" in result.stdout
    result = calibrated("--force", "--json", run="netrun:Runs.none")
    assert json.loads(result.stdout)["problems"][0]["kind"] == "nothing-measured"


def test_what_somebodys_code_raises_is_shown(folder: Path) -> None:
    result = calibrated(run="netrun:Runs.fails")
    assert result.exit_code == 1
    assert str(result.exception) == "--run netrun:Runs.fails: KeyError: 'lost'"
    assert 'raise KeyError("lost")' in result.stderr
    result = calibrated(run="broken:run")
    assert result.exit_code == 2
    assert "a_module_that_is_nowhere" in result.stderr


USAGE: dict[str, list[str]] = {
    "nothing": [],
    "no function": ["--recipe", "recipe.json"],
    "no recipe": ["--run", "netrun:run"],
    "no colon": ["--recipe", "recipe.json", "--run", "netrun"],
    "no such module": ["--recipe", "recipe.json", "--run", "nowhere_to_find:run"],
    "no such function": ["--recipe", "recipe.json", "--run", "netrun:walk"],
    "no function at all": ["--recipe", "recipe.json", "--run", "netrun:number"],
    "nowhere to write": ["--recipe", "plain.json", "--run", "netrun:run"],
    "no tokens to choose alpha by": ["--recipe", "search.json", "--run", "netrun:run"],
    "edges": ["--recipe", "recipe.json", "--run", "netrun:run", "--timesteps", "1,0"],
    "no numbers": ["--recipe", "recipe.json", "--run", "netrun:run", "--timesteps", "a,b"],
    "files": ["--recipe", "recipe.json", "--run", "netrun:run", "a.safetensors"],
    "nothing to merge": ["--merge", "--out", "c"],
    "no merged file": ["--merge", "a", "b"],
    "merging a run": ["--merge", "a", "--out", "c", "--run", "netrun:run"],
}


def test_tokens_that_alpha_is_chosen_by(folder: Path) -> None:
    result = invoke("--recipe", "search.json", "--run", "netrun:run", "--tokens", 4)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("arguments", USAGE.values(), ids=USAGE)
def test_usage(folder: Path, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Error" in result.stderr
