"""``convert`` as a user meets it: what it prints where, how it exits, what it says of mistakes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantrecipe import __version__
from quantrecipe.cli import main as quantrecipe_main
from quantrecipe.cli.convert import main as convert_main
from quantrecipe.cli.progress import ProgressLine, human_time
from quantrecipe.converter import convert
from tests.converter.making import (
    Json,
    numbers,
    parsed,
    read_lock,
    recipe,
    result_of,
    save,
    small,
    tree,
    weight_spec,
)
from tests.converter.smoothed_model import CHANNELS, Model

THIRD_PARTY = Path(__file__).parents[1] / "converter" / "third_party"
OUTPUT = ["model.safetensors", "recipe.json", "recipe.lock.json"]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: object
    stdout: str
    stderr: str


Run = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``convert`` as its console script does."""

    def run(*arguments: str, text: str = "", script: Callable[[], None] = convert_main) -> Ended:
        monkeypatch.setattr(sys, "argv", ["convert", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        with pytest.raises(SystemExit) as leaving:
            script()
        captured = capsys.readouterr()
        return Ended(leaving.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a source and a recipe, which is also where the command runs."""
    monkeypatch.chdir(tmp_path)
    small(Path("in/m.safetensors"))
    write("recipe.json", recipe())
    return tmp_path


def write(name: str, document: Json) -> None:
    Path(name).write_text(json.dumps(document, indent=2))


# What it prints


def test_the_summary_for_people(run: Run, folder: Path) -> None:
    keep = [{"modules": ["b"], "dtype": "bfloat16", "reason": "small"}]
    write("recipe.json", recipe(protected=keep))
    ended = run("--recipe", "recipe.json", "in", "--out", "out")
    assert (ended.code, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    (output,) = read_lock(Path("out"))["outputs"]
    error = read_lock(Path("out"))["modules"][0]["error"]
    assert lines[0].startswith("small: 304 B -> ")
    assert [line.split() for line in lines[1:4]] == [
        ["1", "by", "scheme", "all", "int8", "channel"],
        ["1", "protected", "bfloat16"],
        ["1", "other", "tensors,", "copied"],
    ]
    sqnr = f"{error['sqnr_db']:.2f} dB"
    assert lines[4] == f"  weight SQNR: worst {sqnr} (model: a), mean {sqnr}"
    assert lines[5] == f"  largest error: {error['max_error_in_scales']:.4f} scales (model: a)"
    assert lines[6].split() == [
        str(Path("out/model.safetensors")),
        f"{output['bytes']:,}",
        "bytes,",
        "sha256",
        output["sha256"],
    ]
    assert lines[7].strip() == str(Path("out/recipe.lock.json"))
    assert sorted(tree(Path("out"))) == OUTPUT


def test_the_summary_says_which_alpha_was_chosen(run: Run, tmp_path: Path) -> None:
    model = Model(tmp_path, 1, {"a": ("bfloat16", 4), "b": ("bfloat16", 4)})
    model.keep_tokens({name: torch.zeros(1, CHANNELS) for name in "ab"})
    path = model.recipe(weight_spec("int8"), {"search": [0.75, 0.25]})
    ended = run("--recipe", str(path), str(model.source), "--out", str(tmp_path / "out"))
    assert ended.code == 0
    assert "  alpha by group of siblings: 0.25 in 2" in ended.stdout.splitlines()


def test_the_summary_for_machines(run: Run, folder: Path) -> None:
    ended = run("--recipe", "recipe.json", "in", "--out", "out", "--json")
    assert (ended.code, ended.stderr) == (0, "")
    summary = json.loads(ended.stdout)
    lock = read_lock(Path("out"))
    errors = [module["error"] for module in lock["modules"]]
    seconds = summary.pop("seconds")
    assert isinstance(seconds, float)
    assert seconds >= 0
    assert summary == {
        "out": "out",
        "recipe": "small",
        "recipe_sha256": lock["recipe_sha256"],
        "source_bytes": 304,
        "output_bytes": Path("out/model.safetensors").stat().st_size,
        "modules": [{"count": 2, "disposition": "by scheme all", "weight": "int8 channel"}],
        "transfers": {"quantized": 2},
        "others": 1,
        "weight_sqnr_db": {
            "worst": min(error["sqnr_db"] for error in errors),
            "mean": pytest.approx(sum(error["sqnr_db"] for error in errors) / 2, abs=0.005),
        },
        "max_error_in_scales": max(error["max_error_in_scales"] for error in errors),
        "files": lock["outputs"],
    }


def test_nothing_measured_is_null_and_not_zero(run: Run, folder: Path) -> None:
    keep = [{"modules": ["**"], "dtype": "float32", "reason": "all"}]
    write("recipe.json", recipe(protected=keep, rules=[], schemes={}, target="plain"))
    summary = json.loads(run("--recipe", "recipe.json", "in", "--out", "out", "--json").stdout)
    assert summary["weight_sqnr_db"] == {"worst": None, "mean": None}
    assert summary["max_error_in_scales"] is None
    shutil.rmtree("out")
    ended = run("--recipe", "recipe.json", "in", "--out", "out")
    assert "SQNR" not in ended.stdout
    assert ended.code == 0


def test_an_exact_weight_is_said_to_be_exact(run: Run, folder: Path) -> None:
    save(Path("exact.safetensors"), {"a.weight": torch.arange(-127.0, 128.0)[None]})
    ended = run("--recipe", "recipe.json", "exact.safetensors", "--out", "out")
    assert "worst exact (model: a), mean exact" in ended.stdout


def test_a_dry_run_writes_nothing(run: Run, folder: Path) -> None:
    before = tree(folder)
    ended = run("--recipe", "recipe.json", "in", "--dry-run")
    assert (ended.code, ended.stderr) == (0, "")
    assert "Quantized: 2 modules" in ended.stdout
    document = json.loads(run("--recipe", "recipe.json", "in", "--dry-run", "--json").stdout)
    assert [module["name"] for module in document["modules"]] == ["a", "b"]
    assert tree(folder) == before
    ended = run("--recipe", "recipe.json", "in", "--out", "out", "--dry-run")
    assert ended.code == 0
    assert tree(folder) == before


def test_a_warning_goes_to_stderr(run: Run, folder: Path) -> None:
    tensors = {
        "a.weight": torch.ones(2, 4).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.ones(()),
        "a.input_scale": torch.ones(()),
    }
    save(Path("fp8.safetensors"), tensors)
    write("recipe.json", recipe(source="fp8-scaled"))
    ended = run("--recipe", "recipe.json", "fp8.safetensors", "--out", "out")
    assert ended.code == 0
    assert "warning: " in ended.stderr
    assert "a.input_scale" in ended.stderr
    assert "warning" not in ended.stdout
    ended = run("--recipe", "recipe.json", "fp8.safetensors", "--out", "2", "--json")
    json.loads(ended.stdout)


def test_a_recipe_from_standard_input(run: Run, folder: Path) -> None:
    ended = run("--recipe", "-", "in", "--out", "out", text=json.dumps(recipe()))
    assert ended.code == 0
    ended = run("--recipe", "-", "in", "--out", "2", text='{"kind": "recipe",\n  "version": 7}')
    assert ended.code == 1
    assert ended.stderr.startswith("error: <stdin>:2:14 (/version)")


def test_a_recipe_beside_its_source(run: Run, folder: Path) -> None:
    document = recipe()
    document["source"]["path"] = "in"
    Path("deep").mkdir()
    shutil.move("in", "deep/in")
    write("deep/recipe.json", document)
    assert run("--recipe", "deep/recipe.json", "--out", "out").code == 0


def test_a_built_in_recipe(run: Run, folder: Path) -> None:
    rng = np.random.default_rng(0)
    save(Path("in/m.safetensors"), {"a.weight": numbers(rng, 64, 64).bfloat16()})
    ended = run("--recipe", "int8-all-linears", "in", "--out", "out")
    assert (ended.code, ended.stderr) == (0, "")
    assert "int8-all-linears: " in ended.stdout


@pytest.mark.parametrize("converter", ["streaming", "reference"])
def test_the_command_writes_what_the_function_does(run: Run, folder: Path, converter: str) -> None:
    expected = convert(parsed(recipe()), Path("in"), Path("expected")).out
    how = ("--converter", converter, "--block-size", "1")
    assert run("--recipe", "recipe.json", "in", "--out", "out", *how).code == 0
    assert result_of(Path("out")) == result_of(expected)


def test_the_command_under_its_other_name(run: Run, folder: Path) -> None:
    arguments = ("convert", "--recipe", "recipe.json", "in", "--out", "out")
    ended = run(*arguments, script=quantrecipe_main)
    assert (ended.code, ended.stderr) == (0, "")
    assert run("--version", script=quantrecipe_main).stdout.split()[-1] == __version__


def test_help_says_what_there_is(run: Run) -> None:
    ended = run("--help")
    assert (ended.code, ended.stderr) == (0, "")
    options = "recipe out dry-run converter jobs device executor resume no-resume force json"
    for option in (f"--{name}" for name in options.split()):
        assert option in ended.stdout


# How it exits


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing option '--recipe'"),
        (["--recipe", "recipe.json", "in"], "Missing option '--out'"),
        (["--recipe", "recipe.json", "in", "--out", ""], "Invalid value for '--out': it is empty"),
        (["--recipe", "recipe.json", "", "--out", "out"], "Invalid value for '[SOURCE]'"),
        (
            ["--recipe", "recipe.json", "in", "--out", "out", "--converter", "streamin"],
            (
                "Invalid value for '--converter': no converter is called 'streamin'. "
                "Did you mean 'streaming'?"
            ),
        ),
        (
            ["--recipe", "recipe.json", "in", "--out", "out", "--executor", "rya"],
            "Invalid value for '--executor': there is no executor 'rya'. Did you mean 'ray'?",
        ),
        (
            ["--recipe", "recipe.json", "in", "--out", "out", "--executor", "dask:head"],
            "Invalid value for '--executor': 'head' is no address of a cluster. Write dask:HOST:",
        ),
        (
            ["--recipe", "recipe.json", "in", "--out", "out", "--device", "gpu"],
            "Invalid value for '--device': device 'gpu': is not known. Use cpu, cuda, or",
        ),
        (["--recipe", "recipe.json", "in", "--out", "o", "--block-size", "0"], "'--block-size'"),
        (["--recipe", "recipe.json", "in", "--oout", "out"], "--out"),
        (["--recipe", "recipe.json", "in", "more", "--out", "out"], "unexpected extra argument"),
    ],
    ids=[
        "nothing",
        "no out",
        "empty out",
        "empty source",
        "converter",
        "executor",
        "address",
        "device",
        "block",
        "option",
        "extra",
    ],
)
def test_usage_exits_with_2(run: Run, folder: Path, arguments: list[str], says: str) -> None:
    before = tree(folder)
    ended = run(*arguments)
    assert (ended.code, ended.stdout) == (2, "")
    assert says in ended.stderr
    assert tree(folder) == before


def scaled_source() -> None:
    codes = torch.ones(4, 8).to(torch.float8_e4m3fn)
    save(Path("fp8/m.safetensors"), {"a.weight": codes, "a.weight_scale": torch.ones(4)})


def nan_source() -> None:
    weight = torch.ones(3, 4)
    weight[2, 1] = float("nan")
    save(Path("nan/m.safetensors"), {"a.weight": weight})


def two_files() -> None:
    for name in ("x", "y"):
        save(Path(f"two/{name}.safetensors"), {f"{name}.weight": torch.ones(2, 2)})


MISTAKES: dict[str, tuple[Callable[[], object], list[str], list[str]]] = {
    "source not there": (
        lambda: None,
        ["recipe.json", "inn"],
        ["error: inn: there is no such file or folder\n  Did you mean 'in'?"],
    ),
    "no source": (
        lambda: None,
        ["recipe.json"],
        ["recipe.json:5:13 (/source): the recipe names no local source\n  Give the folder"],
    ),
    "recipe not there": (
        lambda: None,
        ["recipes.json", "in"],
        ["error: recipes.json", "no such file", "Did you mean 'recipe.json'?"],
    ),
    "recipe of no name": (
        lambda: None,
        ["ideogram4-fp8", "in"],
        ["no built-in recipe is called 'ideogram4-fp8'", "Did you mean 'ideogram-4-fp8'?"],
    ),
    "typo in a value": (
        lambda: write("r.json", recipe(weight_spec("int8", "chanel"))),
        ["r.json", "in"],
        ["r.json:12:24 (/schemes/all/weight/granularity)", "Did you mean 'channel'?"],
    ),
    "typo in a field": (
        lambda: write("r.json", recipe(rulez=[])),
        ["r.json", "in"],
        ["(/rulez)", "Did you mean 'rules'?"],
    ),
    "broken JSON": (
        lambda: Path("r.json").write_text('{"kind": "recipe",\n "version": 1,,}'),
        ["r.json", "in"],
        ["error: r.json:2:15: "],
    ),
    "a rule that takes nothing": (
        lambda: write("r.json", recipe(rules=[{"modules": ["layers.*"], "scheme": "all"}])),
        ["r.json", "in"],
        ["r.json:20:9 (/rules/0/modules/0): pattern 'layers.*' takes no module", "'a'"],
    ),
    "a scheme of no name": (
        lambda: write("r.json", recipe(rules=[{"modules": ["**"], "scheme": "al"}])),
        ["r.json", "in"],
        ["(/rules/0/scheme): no scheme is called 'al'\n  Did you mean 'all'?"],
    ),
    "a target that cannot hold it": (
        lambda: write("r.json", recipe(target="fp8-scaled")),
        ["r.json", "in"],
        ["layout 'fp8-scaled' has no place for int8", "It holds: float8_e4m3fn, float8_e5m2."],
    ),
    "fp8 read as plain": (
        scaled_source,
        ["recipe.json", "fp8"],
        ["[a.weight]: float8_e4m3fn tensor", "name the layout that the source is in"],
    ),
    "two files and no index": (
        two_files,
        ["recipe.json", "two"],
        ["2 files of weights and no index: x.safetensors, y.safetensors", "source.parts"],
    ),
    "no safetensors": (
        lambda: Path("x.safetensors").write_text("hello world, this is none"),
        ["recipe.json", "x.safetensors"],
        ["error: x.safetensors: ", "not a safetensors file"],
    ),
    "an empty folder": (
        lambda: Path("empty").mkdir(),
        ["recipe.json", "empty"],
        ["error: empty: ", "no safetensors file; it is empty"],
    ),
    "a NaN": (
        nan_source,
        ["recipe.json", "nan"],
        ["[a.weight]: a NaN at index [2, 1]\n  Repair the source, or protect the module"],
    ),
    "a bound": (
        lambda: write("r.json", recipe(bounds={"min_weight_sqnr_db": 60})),
        ["r.json", "in"],
        ["r.json:29:27 (/bounds/min_weight_sqnr_db) [model: a]: weight SQNR of ", "below"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_hold_exits_with_1_and_says_what_to_do(
    run: Run, folder: Path, mistake: str
) -> None:
    prepare, arguments, says = MISTAKES[mistake]
    prepare()
    before = tree(folder)
    arguments = ["--recipe", *arguments, "--out", "out"]
    ended = run(*arguments)
    assert (ended.code, ended.stdout) == (1, ""), ended.stderr
    for text in says:
        assert text in ended.stderr
    assert "Traceback" not in ended.stderr
    for_machines = run(*arguments, "--json")
    assert (for_machines.code, for_machines.stderr) == (1, "")
    problems = json.loads(for_machines.stdout)["problems"]
    assert len(problems) == ended.stderr.count("error: ")
    for problem in problems:
        assert {"kind", "message"} <= problem.keys()
        assert problem["message"] in ended.stderr
    assert tree(folder) == before


def test_many_problems_are_cut_short_for_people_alone(run: Run, folder: Path) -> None:
    rng = np.random.default_rng(0)
    save(Path("in/m.safetensors"), {f"m{i}.weight": numbers(rng, 3, 5).half() for i in range(30)})
    write("recipe.json", recipe(bounds={"min_weight_sqnr_db": 300}))
    ended = run("--recipe", "recipe.json", "in", "--out", "out")
    assert ended.stderr.count("error: ") == 20
    assert "... and 10 more (--json shows all)" in ended.stderr
    ended = run("--recipe", "recipe.json", "in", "--out", "out", "--json")
    assert len(json.loads(ended.stdout)["problems"]) == 30


def test_an_output_that_cannot_be_written_exits_with_3(run: Run, folder: Path) -> None:
    arguments = ("--recipe", "recipe.json", "in", "--out", "out")
    assert run(*arguments).code == 0
    before = tree(folder)
    ended = run(*arguments)
    assert (ended.code, ended.stdout) == (3, "")
    assert ended.stderr == (
        "error: out: already holds model.safetensors, recipe.json, recipe.lock.json\n"
        "  Give --force to replace these files, or choose another folder.\n"
    )
    ended = run(*arguments, "--json")
    assert (ended.code, ended.stderr) == (3, "")
    (problem,) = json.loads(ended.stdout)["problems"]
    assert problem["kind"] == "failure"
    assert "already holds" in problem["message"]
    ended = run("--recipe", "recipe.json", "in", "--out", "recipe.json")
    assert ended.code == 3
    assert "recipe.json: is not a folder" in ended.stderr
    assert tree(folder) == before
    assert run(*arguments, "--force").code == 0
    assert tree(folder) == before


def test_a_converter_that_lacks_something_exits_with_1(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(THIRD_PARTY))
    write("recipe.json", recipe(weight_spec("int8", "tensor")))
    arguments = ("--recipe", "recipe.json", "in", "--out", "out", "--converter")
    ended = run(*arguments, "numpy")
    assert ended.code == 1
    assert "recipe.json:11:19 (/schemes/all/weight/format)" in ended.stderr
    assert "Could do it: reference, streaming (--converter)." in ended.stderr
    ended = run(*arguments, "gone")
    assert ended.code == 1
    assert "error: 'gone' cannot be loaded from someones_tools.nowhere:Gone" in ended.stderr


def test_a_converter_that_misbehaves_exits_with_3(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(THIRD_PARTY))
    before = tree(folder)
    arguments = ("--recipe", "recipe.json", "in", "--out", "out", "--converter")
    ended = run(*arguments, "forgetful")
    assert ended.code == 3
    assert "nothing was published\n  model: a: model.safetensors [a.weight]" in ended.stderr
    assert tree(folder) == before


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interruption_exits_with_130_and_leaves_nothing(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLine, "advance", interrupt)
    before = tree(folder)
    flags = ["--json"] if as_json else []
    ended = run("--recipe", "recipe.json", "in", "--out", "out", *flags)
    assert (ended.code, ended.stdout) == (130, "")
    assert ended.stderr.strip() == "interrupted"
    assert tree(folder) == before


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_reader_that_has_seen_enough_gets_no_traceback(folder: Path) -> None:
    read, written = os.pipe()
    os.close(read)
    program = "from quantrecipe.cli.convert import main; main()"
    with os.fdopen(written, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-c", program, "--recipe", "recipe.json", "in", "--out", "out"],
            check=False,
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (3, "")
    assert sorted(tree(Path("out"))) == OUTPUT


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_progress_stays_on_one_line_of_a_terminal_and_is_wiped(
    monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("quantrecipe.cli.progress._EVERY_SECONDS", {True: 0.0, False: 0.0})
    with ProgressLine(1000) as progress:
        progress.advance(250, "layers.0.attention.qkv." + "x" * 100)
        progress.advance(750, "short")
    text = terminal.getvalue()
    drawn = text.split("\r")
    assert "\n" not in text
    assert "25% [######" in drawn[1]
    assert "100% [" in drawn[2]
    assert max(map(len, drawn)) < int(columns)
    assert drawn[-2].strip() == drawn[-1] == ""


def test_progress_in_a_log_is_whole_lines_and_rare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressLine(1000) as progress:
        progress.advance(1000, "a")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("quantrecipe.cli.progress._EVERY_SECONDS", {True: 0.0, False: 0.0})
    with ProgressLine(1000) as progress:
        progress.advance(500, "a")
        progress.advance(500, "b")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["50%", "100%"]
    with ProgressLine(1000, quiet=True) as progress:
        progress.advance(1000, "a")
    with ProgressLine(0) as progress:
        progress.advance(0, "a")
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (725, "12:05"), (3753, "1:02:33")]
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert human_time(seconds) == text
