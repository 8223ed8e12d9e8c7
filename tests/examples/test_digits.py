"""The model that draws digits: what is committed is whole, and what it was made with works."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablation import PAIRS, RECIPES, Measured, draw_pictures, summary, write
from denoiser.classifier import load_classifier, read
from denoiser.data import PROMPTS, describe, load_digits, text_features, to_images, to_tokens
from denoiser.fidelity import image_psnr, interval, velocity_sqnr
from denoiser.network import PARTS, WEIGHTS, new_network
from denoiser.outliers import SPIKED, plant_mild, plant_spikes, spiked_module
from denoiser.sampler import GROUP, Branches, Step, draw, look, noise, trajectory
from quantrecipe.converter import plan
from quantrecipe.converter.calibration import Calibration
from quantrecipe.schema import load_recipe

# What is loaded and calibrated for all of them is so once.
pytestmark = pytest.mark.xdist_group("digits")

FOLDER = WEIGHTS.parent / "recipes"
FEW = PROMPTS[::29]


def test_weights_are_those_of_the_record() -> None:
    record = json.loads((WEIGHTS / "training.json").read_text(encoding="utf-8"))
    for name, digest in record["sha256"].items():
        assert hashlib.sha256((WEIGHTS / name).read_bytes()).hexdigest() == digest, name
    for part, spikes in record["spikes"].items():
        assert [spike["module"] for spike in spikes] == [spiked_module(n) for n in SPIKED[part]]


def test_the_same_seed_draws_the_same_digits_and_they_can_be_read(branches: Branches) -> None:
    first = draw(branches, FEW, seed=1, steps=4)
    labels = torch.tensor([prompt.label for prompt in FEW])
    assert (read(load_classifier(), first) == labels).float().mean() >= 0.9
    some = FEW[:2]
    once = draw(branches, some, seed=1, steps=2)
    assert torch.equal(once, draw(branches, some, seed=1, steps=2))
    assert not torch.equal(once, draw(branches, some, seed=2, steps=2))


def test_threads_change_nothing(branches: Branches) -> None:
    prompts = PROMPTS[: GROUP + 1]
    latents, features = noise(len(prompts), 0), text_features(prompts)
    alone = look(branches, latents, 0.5, features)
    with ThreadPoolExecutor(3) as threads:
        shared = Branches(branches.conditional, branches.unconditional, threads)
        beside = look(shared, latents, 0.5, features)
    assert torch.equal(alone.velocity, beside.velocity)
    last = look(branches, latents[GROUP:], 0.5, features[GROUP:])
    assert torch.equal(alone.velocity[GROUP:], last.velocity)


def test_a_network_is_no_noise_from_itself_and_some_from_another(branches: Branches) -> None:
    some = FEW[:2]
    reference = trajectory(branches, some, seed=0, steps=2)
    with np.errstate(divide="ignore"):
        assert np.isinf(velocity_sqnr(branches, reference, some)).all()
    swapped = Branches(branches.unconditional, branches.conditional)
    assert (velocity_sqnr(swapped, reference, some) < 20).all()


def velocity(branches: Branches) -> Step:
    return look(branches, noise(4, 0), 0.5, text_features(PROMPTS[:4]))


def test_mild_outliers_change_nothing_but_sizes() -> None:
    torch.manual_seed(0)
    plain = new_network()
    planted = copy.deepcopy(plain)
    plant_mild(planted)
    before = velocity(Branches(plain, plain))
    after = velocity(Branches(planted, planted))
    assert torch.allclose(after.conditional, before.conditional, atol=1e-5)
    norms = planted.get_parameter("layers.0.attention_norm1.weight")
    assert sorted(norms.tolist())[-5:] == [1.0, 32.0, 32.0, 32.0, 32.0]


def test_spikes_cancel() -> None:
    torch.manual_seed(0)
    network = new_network()
    layers = SPIKED["conditional"]
    inputs = {spiked_module(layer): torch.randn(50, 256) for layer in layers}
    spikes = plant_spikes(network, "conditional", inputs)
    with_spikes = velocity(Branches(network, network))
    for spike in spikes:
        with torch.no_grad():
            network.get_submodule(spike.module).get_parameter("weight")[:, spike.copies] = 0
    without = velocity(Branches(network, network))
    assert torch.allclose(with_spikes.conditional, without.conditional, atol=1e-4)


def test_a_step_of_training_moves_every_weight_that_it_can() -> None:
    from train import batches, fit

    digits, _ = load_digits()
    torch.manual_seed(0)
    network = new_network()
    before = copy.deepcopy(network)
    average = fit(network, batches(digits, 2, 4, seed=0), text=True, steps=2)
    moved = {
        name
        for (name, new), old in zip(average.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert moved == {name for name, _ in average.named_parameters()}


def test_digits_and_their_words() -> None:
    train, held_out = load_digits()
    assert (len(train), len(held_out)) == (1437, 360)
    assert torch.equal(to_images(to_tokens(train.images)), train.images)
    stroke = np.zeros((3, 8, 8), np.uint8)
    for row in range(8):
        stroke[0, row, 7 - row] = 16  # leans forward
        stroke[1, row, 3] = 16
        stroke[2, row, row] = 16
    words = [prompt.slant for prompt in describe(stroke, np.zeros(3, np.uint8))]
    assert words == ["forward", "upright", "backward"]
    assert len(set(PROMPTS)) == 270
    assert len({tuple(row.flatten().tolist()) for row in text_features(PROMPTS)}) == 270


@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=40))
@settings(max_examples=5, deadline=None)
def test_an_interval_stays_inside_the_values(values: list[float]) -> None:
    mean, low, high = interval(np.array(values))
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert mean == pytest.approx(np.mean(values))


def test_psnr_of_a_known_difference() -> None:
    images = torch.zeros(1, 64)
    assert image_psnr(images + 0.2, images) == pytest.approx(20.0, abs=1e-4)


@pytest.fixture(scope="module")
def calibrated(branches: Branches, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes, with statistics of one step beside them."""
    folder = tmp_path_factory.mktemp("digits") / "recipes"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    calibration = Calibration(load_recipe(folder / "w8a8-smoothed.json"))
    with (
        calibration.observe(branches.conditional, "conditional"),
        calibration.observe(branches.unconditional, "unconditional"),
    ):
        trajectory(branches, FEW[:2], seed=0, steps=1)
    calibration.measurements.save(folder / "statistics.safetensors")
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_the_weights(calibrated: Path, name: str) -> None:
    planned = plan(calibrated / f"{name}.json", WEIGHTS)
    assert {module.part for module in planned.modules} == set(PARTS)


def test_every_recipe_is_measured_and_every_pair_is_of_recipes() -> None:
    assert sorted(RECIPES) == sorted(path.stem for path in FOLDER.glob("*.json"))
    assert {name for pair in PAIRS for name in pair} <= set(RECIPES)


def test_results_are_written_and_drawn(tmp_path: Path) -> None:
    images, right = torch.zeros(3, 64), np.ones(3)
    variants = {
        name: Measured(np.arange(3.0) + better, np.ones(3), right, images, 3.5)
        for name, better in (("w8a8", 0), ("w8a8-rotated", 2))
    }
    results = summary(variants, right)
    (pair,) = results["pairs"]
    assert pair["of"] == "w8a8-rotated"
    assert pair["sqnr_db"] == {"mean": 2, "low": 2, "high": 2}
    values = {0: (10.0, 10.0, 10.0), 6: (30.0, 20.0, 10.0)}
    rungs = {
        order: [{"protected": count, "sqnr_db": row[place]} for count, row in values.items()]
        for place, order in enumerate(("ranked", "random", "reverse"))
    }
    climbed = {"recipe": "w8a8", "prompts": 3, "knee": 6, "rungs": rungs}
    results["ladder"] = climbed | {"planted": 6, "planted_among_the_noisiest": 5}
    shown = {f"{name}/images": images.numpy() for name in ("bf16", *variants)}
    write(tmp_path, results, shown | {"shown": np.array([0, 90, 180])})
    assert json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8")) == results
    said = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "| w8a8-rotated less w8a8 | 2.0 [2.0, 2.0] |" in said
    assert "| 6 (planted, knee) | 30.0 | 20.0 | 10.0 |" in said
    pytest.importorskip("matplotlib")
    draw_pictures(tmp_path)
    for name in ("images.png", "ladder.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG"), name
