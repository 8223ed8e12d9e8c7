"""Folders of outputs: prompts and seeds by name, partners, and lines that can be read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantrecipe.evaluate.metrics.protocol import Against
from quantrecipe.evaluate.metrics.scoring import outputs_in, read_prompts, score_folder
from quantrecipe.evaluate.metrics.texts import ExactMatch
from quantrecipe.evaluate.scores.reading import read_scores
from quantrecipe.schema.problems import InvalidInput


class Constant:
    name = "constant"
    higher_is_better = True
    suffixes = (".txt",)
    against: Against = "prompt"

    def __init__(self, value: float) -> None:
        self.value = value

    def score(self, output: Path, against: Path | str) -> float:
        return self.value


def fill(folder: Path, *names: str, text: str = "x") -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(text, "utf-8")
    return folder


def test_names_say_prompt_and_seed(tmp_path: Path) -> None:
    names = ("a.txt", "b.seed3.txt", "b_seed04.TXT", "c-d-seed12.txt", "seed5.txt", "x.json")
    found = outputs_in(fill(tmp_path, *names), (".txt",))
    assert {key: path.name for key, path in found.items()} == {
        ("a", 0): "a.txt",
        ("b", 3): "b.seed3.txt",
        ("b", 4): "b_seed04.TXT",
        ("c-d", 12): "c-d-seed12.txt",
        ("seed5", 0): "seed5.txt",
    }


def kind_of(error: InvalidInput) -> str:
    (problem,) = error.problems
    return problem.kind


def test_outputs_have_to_be_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        outputs_in(fill(tmp_path, "a-seed1.txt", "a.seed01.txt"), (".txt",))
    assert kind_of(caught.value) == "duplicate-output"
    with pytest.raises(InvalidInput) as caught:
        outputs_in(tmp_path, (".png",))
    assert kind_of(caught.value) == "no-outputs"


def test_scores_can_be_read_again(tmp_path: Path) -> None:
    ours = fill(tmp_path / "int8", "a-seed0.txt", "a-seed1.txt")
    theirs = fill(tmp_path / "fp8", "a-seed0.txt")
    fill(theirs, "a-seed1.txt", text="y")
    found = list(score_folder(ExactMatch(), ours, "int8", reference=theirs))
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(each.line() + "\n" for each in found), "utf-8")
    scores, _ = read_scores([path])
    assert [(s.variant, s.metric, s.prompt, s.seed, s.value) for s in scores] == [
        ("int8", "exact-match", "a", 0, 1.0),
        ("int8", "exact-match", "a", 1, 0.0),
    ]


def test_what_has_no_partner(tmp_path: Path) -> None:
    ours, theirs = fill(tmp_path / "a", "p.txt", "q.txt"), fill(tmp_path / "b", "p.txt")
    for one, other in ((ours, theirs), (theirs, ours)):
        with pytest.raises(InvalidInput, match=r"1 of its outputs .* 'q' \(seed 0\)") as caught:
            list(score_folder(ExactMatch(), one, "v", reference=other))
        assert kind_of(caught.value) == "missing-output"
        assert caught.value.problems[0].file == str(ours)
    with pytest.raises(InvalidInput) as caught:
        list(score_folder(ExactMatch(), ours, "v"))
    assert kind_of(caught.value) == "no-reference"
    with pytest.raises(InvalidInput) as caught:
        list(score_folder(Constant(1), ours, "v"))
    assert kind_of(caught.value) == "no-prompts"
    with pytest.raises(InvalidInput) as caught:
        list(score_folder(Constant(1), ours, "v", prompts={"p": "text"}))
    assert kind_of(caught.value) == "missing-output"


def test_a_score_is_a_number(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        list(score_folder(Constant(float("nan")), fill(tmp_path, "p.txt"), "v", prompts={"p": ""}))
    assert kind_of(caught.value) == "not-finite"


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text('{"p": "a cat", "q": ""}', "utf-8")
    assert read_prompts(path) == {"p": "a cat", "q": ""}
    for text, kind in (
        ('["p"]', "wrong-type"),
        ('{"p": 1}', "wrong-type"),
        ('{"p": "", "p": ""}', "duplicate-key"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(InvalidInput) as caught:
            read_prompts(path)
        assert kind_of(caught.value) == kind
