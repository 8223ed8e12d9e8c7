"""Metrics by name: ours, other people's, and those that are not there."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quantrecipe.evaluate.metrics import learned
from quantrecipe.evaluate.metrics.finding import BUILT_IN, GROUP, find_scorer, scorer_names
from quantrecipe.evaluate.metrics.protocol import Scorer
from quantrecipe.schema.evaluation import KNOWN_METRICS
from quantrecipe.schema.problems import InvalidInput


class Length:
    """A metric of somebody else's: how much longer a text is than its prompt."""

    name = "length"
    higher_is_better = False
    suffixes = (".txt",)
    against = "prompt"

    def score(self, output: Path, against: Path | str) -> float:
        return float(len(output.read_text("utf-8")) - len(str(against)))


class Nameless:
    """No metric."""


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Any:
    def register(**points: str) -> None:
        found = EntryPoints(EntryPoint(name, value, GROUP) for name, value in points.items())
        monkeypatch.setattr(
            "importlib.metadata.entry_points",
            lambda group: found if group == GROUP else EntryPoints(),
        )

    # Entry points are loaded by name, which this module does not have for everyone.
    monkeypatch.setitem(sys.modules, "somebodys_metrics", sys.modules[__name__])
    return register


def test_those_of_the_package_are_metrics_and_known_to_recipes() -> None:
    assert BUILT_IN.keys() == KNOWN_METRICS.keys()
    for name, known in KNOWN_METRICS.items():
        scorer = find_scorer(name)
        assert isinstance(scorer, Scorer)
        assert (scorer.name, scorer.higher_is_better) == (name, known.higher_is_better)
        assert scorer.against in ("reference", "prompt")


def test_another_project_adds_one(registered: Any, tmp_path: Path) -> None:
    registered(length="somebodys_metrics:Length")
    assert scorer_names() == [*BUILT_IN, "length"]
    scorer = find_scorer("length")
    (tmp_path / "p.txt").write_text("four", "utf-8")
    assert scorer.score(tmp_path / "p.txt", "one") == 1


@pytest.mark.parametrize(
    ("points", "name", "kind"),
    [
        ({}, "psnt", "unknown-metric"),
        ({"psnr": "somebodys_metrics:Length"}, "ssim", "duplicate-entry-point"),
        ({"other": "somebodys_metrics:Length"}, "other", "not-a-metric"),
        ({"none": "somebodys_metrics:Nameless"}, "none", "not-a-metric"),
        ({"gone": "somebodys_metrics:Gone"}, "gone", "broken-entry-point"),
    ],
)
def test_what_is_no_metric(registered: Any, points: dict[str, str], name: str, kind: str) -> None:
    registered(**points)
    with pytest.raises(InvalidInput) as caught:
        find_scorer(name)
    assert [problem.kind for problem in caught.value.problems] == [kind]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pillow = pytest.importorskip("PIL.Image")
    path = tmp_path / "p.png"
    pillow.fromarray(np.zeros((12, 12, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("clip-score", "transformers", "quantrecipe[models,evaluate]"),
        ("pickscore", "transformers", "quantrecipe[models,evaluate]"),
        ("hpsv2", "hpsv2", "hpsv2"),
        ("lpips", "lpips", "lpips torchvision"),
        ("ocr-edit-distance", "rapidocr", "rapidocr onnxruntime"),
        ("psnr", "PIL", "quantrecipe[evaluate]"),
    ],
)
def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, picture: Path, name: str, package: str, install: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    scorer = find_scorer(name)
    with pytest.raises(InvalidInput) as caught:
        scorer.score(picture, picture if scorer.against == "reference" else "a prompt")
    (problem,) = caught.value.problems
    assert problem.kind == "missing-package"
    assert f"the metric {name} needs {package}" in problem.message
    assert problem.hint is not None
    assert install in problem.hint


def broken(*_: object, **__: object) -> None:
    raise OSError("no connection\nand a long story")


@pytest.mark.parametrize("name", ["clip-score", "pickscore", "hpsv2", "lpips", "ocr-edit-distance"])
def test_absent_weights_are_named(
    monkeypatch: pytest.MonkeyPatch, picture: Path, name: str
) -> None:
    fake: Any = ModuleType("fake")
    fake.CLIPModel = fake.CLIPProcessor = SimpleNamespace(from_pretrained=broken)
    fake.score = fake.LPIPS = fake.RapidOCR = broken
    for package in ("transformers", "hpsv2", "lpips", "rapidocr", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, fake)
    scorer = find_scorer(name)
    with pytest.raises(InvalidInput) as caught:
        scorer.score(picture, picture if scorer.against == "reference" else "a prompt")
    (problem,) = caught.value.problems
    assert problem.kind == "missing-weights"
    assert problem.message.endswith("cannot be loaded: no connection")


def test_what_packages_say_becomes_the_score(
    monkeypatch: pytest.MonkeyPatch, picture: Path
) -> None:
    fake: Any = ModuleType("fake")
    fake.score = lambda path, prompt, hps_version: [len(prompt) / 10]
    fake.RapidOCR = lambda: lambda path: SimpleNamespace(txts=("OPEN ", "DAILY"))
    fake.LPIPS = lambda **_: lambda a, b: (a - b).abs().mean()
    for package in ("hpsv2", "lpips", "rapidocr", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, fake)
    assert find_scorer("hpsv2").score(picture, "four") == pytest.approx(0.4)
    assert find_scorer("lpips").score(picture, picture) == 0
    assert find_scorer("ocr-edit-distance").score(picture, "OPEN  DAILY\n") == 0
    assert find_scorer("ocr-edit-distance").score(picture, "OPEN DALLY") == pytest.approx(0.1)


def test_clip_with_weights_of_no_training(monkeypatch: pytest.MonkeyPatch, picture: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(
        text_config={**small, "num_attention_heads": 1, "vocab_size": 10},
        vision_config={**small, "num_attention_heads": 1, "image_size": 16, "patch_size": 8},
        projection_dim=4,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)

    def processor(**given: Any) -> dict[str, torch.Tensor]:
        assert given["text"] == ["a prompt"]
        (image,) = given["images"]
        assert image.shape == (12, 12, 3)
        return {
            "input_ids": torch.tensor([[1, 2, 9]]),
            "pixel_values": torch.ones(1, 3, 16, 16),
        }

    for scorer in (learned.ClipScore(), learned.PickScore()):
        monkeypatch.setitem(scorer.__dict__, "_made", (model.eval(), processor))
        cosine, scale = scorer.logit(picture, "a prompt")
        assert -1 <= cosine <= 1
        wanted = 100 * max(0, cosine) if scorer.name == "clip-score" else scale * cosine
        assert scorer.score(picture, "a prompt") == pytest.approx(wanted)
