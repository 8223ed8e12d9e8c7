"""From a Hub to a published folder: the README's commands, and what is published with it."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import snapshot_download
from PIL import Image

import ablation
import calibrate
import journey
import score
import usage
from denoiser.data import PROMPTS, SIDE
from denoiser.network import WEIGHTS
from denoiser.outliers import SPIKED, spiked_module
from denoiser.sampler import Branches, draw
from quantrecipe.cli import cli
from quantrecipe.cli.convert import convert
from tests.support.hub_server import HubServer
from tests.support.serve import parse

pytestmark = pytest.mark.xdist_group("digits")

VARIANTS = ("int8", "fp8", "nf4")


def test_the_commands_are_those_of_the_readme() -> None:
    lines = journey.commands()
    assert not [line for line in lines if "\\" in line]
    assert [line.split()[0] for line in lines if line.startswith(("convert", "hf"))] == [
        *["convert"] * len(VARIANTS),
        "hf",
    ]
    quantrecipe = [line.split()[1] for line in lines if line.startswith("quantrecipe ")]
    assert [name for at, name in enumerate(quantrecipe) if name not in quantrecipe[:at]] == [
        "pull",
        "calibrate",
        "rank",
        "evaluate",
        "report",
        "publish",
    ]
    assert "published/usage.py" in lines[-1]


def test_commands_run_in_order_until_one_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = ["echo one $WHICH > a", "cat a", "exit 3", "echo two > b"]
    assert journey.run(lines, tmp_path, {**os.environ, "WHICH": "word"}) == 3
    assert not (tmp_path / "b").exists()
    assert "$ cat a\none word\n\n$ exit 3\n" in capfd.readouterr().out


def test_the_program_runs_them_against_a_hub_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str] = {}

    def run(lines: list[str], folder: Path, environment: dict[str, str]) -> int:
        assert lines == journey.commands()
        assert (folder, list(folder.iterdir())) == (tmp_path / "out", [])
        seen.update(environment)
        with urlopen(f"{seen['HF_ENDPOINT']}/api/models/digits/bf16") as answer:
            files = {each["rfilename"] for each in json.load(answer)["siblings"]}
        assert {"README.md", "transformer/config.json"} < files
        return 7

    monkeypatch.setattr(journey, "run", run)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "of-before").touch()
    with pytest.raises(SystemExit) as ended:
        journey.main(["--few", "--out", str(tmp_path / "out")])
    assert ended.value.code == 7
    assert seen["HF_ENDPOINT"].startswith("http://127.0.0.1:")
    assert Path(seen["HF_HOME"]).parent == tmp_path / "out"
    assert seen[score.EVERY] == journey.FEW
    with pytest.raises(URLError):
        urlopen(seen["HF_ENDPOINT"])


@pytest.mark.parametrize("text", ["digits/bf16", "digits=.", "a/b/c=.", "a/b=", "a/b=not-there"])
def test_only_folders_are_served_and_only_under_names_of_repositories(text: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([text])
    assert ended.value.code == 2


def test_a_server_that_does_not_start_is_no_reason_to_ask_another() -> None:
    assert journey.exported(iter(["export A='b c'\n", "\n", "export D=e\n"])) == {"A": "b c"}
    assert journey.exported(iter([])) == {}


@pytest.mark.parametrize("number", [7, 211])
def test_what_is_published_draws_what_the_sampler_draws(branches: Branches, number: int) -> None:
    prompt = PROMPTS[number]
    expected = draw(branches, (prompt,), seed=3).reshape(SIDE, SIDE)
    drawn = usage.draw(branches.conditional, branches.unconditional, list(prompt.words), 3)
    assert torch.equal(drawn, expected)


# The Hub's client hands bytes to the HTTP library as it is no longer done.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_from_the_hub_and_back(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(journey.REPOSITORY, WEIGHTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIGITS", str(journey.HERE))
    monkeypatch.setenv(score.EVERY, "135")
    monkeypatch.setattr(calibrate, "PROMPT_STEP", 27)
    for line in journey.commands():
        if line == "python -m venv clean":
            break
        follow(line)
    protected = json.loads(Path("int8.json").read_text(encoding="utf-8"))["protected"]
    chosen = {
        (part, module)
        for entry in protected
        for part in entry.get("parts", ())
        for module in entry["modules"]
    }
    assert chosen == {(part, spiked_module(layer)) for part in SPIKED for layer in SPIKED[part]}
    for file, names in (("evaluation.json", VARIANTS), ("fidelity.json", ("int8", "nf4"))):
        comparisons = json.loads(Path(file).read_text(encoding="utf-8"))["comparisons"]
        assert {each["variant"] for each in comparisons} == set(names)
    assert f"{score.named(PROMPTS[0])}-seed0" in Path("report.html").read_text(encoding="utf-8")
    card = hub.repositories["digits/int8"].content("README.md").decode()
    assert card.startswith('---\nlicense: "apache-2.0"\nbase_model:\n- "digits/bf16"\n')
    run_alone(Path("published/usage.py"), monkeypatch)


def follow(line: str) -> None:
    """Do what a command of the README says, in this process."""
    program, *words = shlex.split(os.path.expandvars(line))
    out = Path(words.pop()) if ">" in words else None
    match program:
        case "cp":
            shutil.copy(*words)
        case "python":
            assert words[0] == score.__file__
            score.main([*words[1:], "--seeds", "1"])
        case "hf":
            command_name, repository, option, folder = words
            assert (command_name, option) == ("download", "--local-dir")
            snapshot_download(repository, local_dir=folder)
        case _:
            given = [word for word in words if word != ">"]
            command = {"quantrecipe": cli, "convert": convert}[program]
            result = CliRunner().invoke(command, given, catch_exceptions=False)
            assert result.exit_code == 0, f"{line}\n{result.output}"
            if out is not None:
                out.write_text(result.stdout, encoding="utf-8")


def run_alone(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the published script where this package is not to be had; what it draws is right."""
    assert script.read_bytes() == Path(usage.__file__).read_bytes()
    prompt = PROMPTS[147]
    expected = draw(ablation.load(script.parent), (prompt,), seed=5).reshape(SIDE, SIDE).numpy()
    with monkeypatch.context() as patched:
        for name in list(sys.modules):
            if name.partition(".")[0] in ("quantrecipe", "denoiser", "usage"):
                patched.setitem(sys.modules, name, None)
        patched.setattr(sys, "path", list(sys.path))
        patched.setattr(sys, "argv", [str(script), str(prompt), "--seed", "5", "--out", "a.png"])
        runpy.run_path(str(script), run_name="__main__")
        sys.modules.pop("safetensors_loader")
    with Image.open("a.png") as picture:
        grey = np.asarray(picture)[::8, ::8].astype(float)
    assert picture.size == (64, 64)
    # Of 255 levels. Other kernels add in another order, and some activations round the other way.
    assert np.abs(grey - (127.5 - 127.5 * expected)).max() <= 4
