"""``quantrecipe evaluate``: what it reads, says and writes, and its exit codes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("scipy")

from quantrecipe.checkpoint import OutputExists
from quantrecipe.cli import cli
from quantrecipe.schema.canonical import digest
from quantrecipe.schema.validation import load_document, load_recipe

RECIPE = {
    "kind": "recipe",
    "version": 1,
    "name": "small",
    "source": {"layout": "plain"},
    "schemes": {},
    "rules": [],
    "target": {"layout": "plain"},
    "evaluation": {
        "reference": "fp8",
        "metrics": {"clip-score": {"margin": 1, "higher_is_better": True}},
    },
}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


def write_scores(path: Path, values: Iterable[float], metric: str = "clip-score") -> Path:
    rows = [
        {"prompt": f"p{index}", "seed": 0, "metric": metric, "value": float(value)}
        for index, value in enumerate(values)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Scores of a reference, of what is as good, and of what is worse."""
    draw = np.random.default_rng(0)
    base = draw.normal(17, 3, 100)
    shifts = {"fp8": 0.0, "int8": 0.1, "nf4": -2.0}
    return [
        write_scores(
            tmp_path / f"{name}.jsonl", base + shift + draw.normal(0, 1, 100) * bool(shift)
        )
        for name, shift in shifts.items()
    ]


def recipe(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps(RECIPE | changes), "utf-8")
    return path


def test_what_people_read(files: list[Path], tmp_path: Path) -> None:
    result = invoke("compare", *files, "--recipe", recipe(tmp_path))
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == (
        "paired with fp8, prompt by prompt; p values adjusted for 2 comparisons (Holm)"
    )
    assert lines[2].split("  ")[0] == "metric"
    assert lines[2].endswith("verdict")
    assert lines[3].startswith("clip-score ^  int8")
    assert lines[3].endswith("equivalent within margin")
    assert lines[4].endswith("worse")
    assert lines[6].startswith("clip-score, int8  equivalent within margin: a difference of 1 or")
    assert lines[7].startswith("clip-score, nf4   worse: lower by 2.")


def test_what_is_written_is_what_machines_read(files: list[Path], tmp_path: Path) -> None:
    declared, out = recipe(tmp_path), tmp_path / "result" / "evaluation.json"
    command = ("compare", *files, "--recipe", declared, "--resamples", 500, "--seed", 3)
    result = invoke(*command, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    document, model = load_document(out)
    assert json.loads(result.stdout) == document.value == model.to_json_value()
    value: Any = document.value
    assert value["recipe"] == {
        "name": "small",
        "sha256": digest(load_recipe(declared).to_json_value()),
    }
    assert (value["resamples"], value["seed"], value["confidence"]) == (500, 3, 0.95)
    assert [entry["name"] for entry in value["inputs"]] == ["fp8.jsonl", "int8.jsonl", "nf4.jsonl"]
    for entry, path in zip(value["inputs"], files, strict=True):
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry["scores"] == 100
    assert [each["verdict"] for each in value["comparisons"]] == [
        "equivalent within margin",
        "worse",
    ]
    before = out.read_bytes()
    again = invoke("compare", *files[::-1], *command[4:], "--out", out)
    assert isinstance(again.exception, OutputExists)
    assert "already holds evaluation.json" in str(again.exception)
    assert invoke("compare", *files[::-1], *command[4:], "--out", out, "--force").exit_code == 0
    assert out.read_bytes() == before


def test_verdicts_fail_a_check(files: list[Path], tmp_path: Path) -> None:
    command = ("compare", *files, "--recipe", recipe(tmp_path))
    assert invoke(*command, "--fail-on", "not-shown").exit_code == 0
    assert invoke(*command, "--fail-on", "worse").exit_code == 1


def test_without_a_recipe_there_is_no_equivalence(files: list[Path], tmp_path: Path) -> None:
    result = invoke("compare", *files[:2], "--reference", "fp8", "--json", "--confidence", 0.9)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert "recipe" not in found
    assert found["confidence"] == 0.9
    assert found["metrics"] == {"clip-score": {"higher_is_better": True}}
    (one,) = found["comparisons"]
    assert one["equivalence_test"] is None
    assert one["verdict"] == "not shown"
    assert "without a margin" in one["explanation"]


def test_of_somebodys_metric_somebody_says_which_way(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    files = [
        write_scores(tmp_path / f"{name}.jsonl", draw.normal(shift, 1, 50), "taste")
        for name, shift in (("a", 0), ("b", 3))
    ]
    result = invoke("compare", *files, "--reference", "a")
    assert result.exit_code == 1
    assert "nothing says whether more of taste is better" in str(result.exception)
    for option, verdict in (("--higher", "better"), ("--lower", "worse")):
        result = invoke("compare", *files, "--reference", "a", option, "taste", "--json")
        assert json.loads(result.stdout)["comparisons"][0]["verdict"] == verdict
    result = invoke("compare", *files, "--reference", "a", "--without", "taste")
    assert result.exit_code == 1


def test_few_prompts_are_warned_of(tmp_path: Path) -> None:
    files = [
        write_scores(tmp_path / f"{name}.jsonl", values)
        for name, values in (("a", [1, 2, 3]), ("b", [1, 2, 4]))
    ]
    result = invoke("compare", *files, "--reference", "a")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: b, clip-score: 1 of 3 prompts differ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--recipe", "r.json", "--reference", "a"],
        ["--recipe", "r.json", "--lower", "m"],
        ["--recipe", "r.json", "--confidence", "0.9"],
        ["--reference", "a", "--lower", "m", "--higher", "m"],
        ["--reference", "a", "--confidence", "0.5"],
    ],
)
def test_usage(arguments: list[str]) -> None:
    assert invoke("compare", "a.jsonl", *arguments).exit_code == 2


def test_problems_are_for_machines_too(tmp_path: Path) -> None:
    bad = tmp_path / "a.jsonl"
    bad.write_text("{}\n", "utf-8")
    result = invoke("compare", bad, "--reference", "a", "--json")
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert (problem["kind"], problem["line"]) == ("missing-field", 1)
    nothing = recipe(tmp_path, evaluation=None)
    document = {key: value for key, value in RECIPE.items() if key != "evaluation"}
    nothing.write_text(json.dumps(document), "utf-8")
    result = invoke("compare", bad, "--recipe", nothing, "--json")
    assert json.loads(result.stdout)["problems"][0]["kind"] == "no-evaluation"


def folders(root: Path, contents: Mapping[str, Mapping[str, str]]) -> dict[str, Path]:
    for name, texts in contents.items():
        (root / name).mkdir()
        for file, text in texts.items():
            (root / name / file).write_text(text, "utf-8")
    return {name: root / name for name in contents}


def test_scores_of_folders_can_be_compared(tmp_path: Path) -> None:
    made = folders(
        tmp_path,
        {
            "wanted": {"a.txt": "OPEN", "b.txt": "SHUT"},
            "fp8": {"a.txt": "OPEN", "b.txt": "SHUT"},
            "int8": {"a.txt": "OPEN", "b.txt": "SHUN"},
        },
    )
    out = tmp_path / "scores.jsonl"
    command = ("score", made["fp8"], made["int8"], "--reference", made["wanted"])
    metrics = ("--metric", "normalized-edit-distance", "--metric", "exact-match")
    printed = invoke(*command, *metrics)
    assert printed.exit_code == 0, printed.output
    assert json.loads(printed.stdout.splitlines()[-3]) == {
        "prompt": "b",
        "seed": 0,
        "metric": "normalized-edit-distance",
        "value": 0.25,
        "variant": "int8",
    }
    written = invoke(*command, *metrics, "--out", out)
    assert written.stdout == f"8 scores written to {out}\n"
    assert out.read_text("utf-8") == printed.stdout
    assert isinstance(invoke(*command, *metrics, "--out", out).exception, OutputExists)
    assert invoke(*command, *metrics, "--out", tmp_path / "scores.csv").exit_code == 2
    found = json.loads(invoke("compare", out, "--reference", "fp8", "--json").stdout)
    assert [each["difference"] for each in found["comparisons"]] == [-0.5, 0.125]


def test_folders_have_names_of_their_own(tmp_path: Path) -> None:
    made = folders(tmp_path, {"a": {"p.txt": ""}})
    result = invoke("score", made["a"], made["a"], "--metric", "exact-match")
    assert result.exit_code == 2


def test_metrics_are_listed() -> None:
    text = invoke("metrics").stdout.splitlines()
    assert text[0].split() == ["METRIC", "BETTER", "AGAINST", "FILES"]
    listed = json.loads(invoke("metrics", "--json").stdout)
    assert len(listed) == len(text) - 1 >= 11
    assert listed[0] == {
        "name": "psnr",
        "higher_is_better": True,
        "suffixes": [".png", ".jpg", ".jpeg", ".webp", ".bmp"],
        "against": "reference",
    }
