"""What was written means what the source meant, to within the format's bound."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from quantrecipe.converter import convert
from quantrecipe.loaders import load_state_dict, open_checkpoint
from tests.converter.making import (
    FLOAT8,
    KINDS,
    WEIGHTS,
    Json,
    everything,
    group_of,
    parsed,
    read_lock,
    recipe,
    save,
    save_statistics,
    spread,
)

# Worst relative error, half the smallest subnormal, half the top step, largest code.
FLOAT8_LIMITS = {
    "float8_e4m3fn": (1 / 17, 2.0**-10, 16.0, 448.0),
    "float8_e5m2": (1 / 9, 2.0**-17, 4096.0, 57344.0),
}


def bound(spec: Json, weight: Tensor, scale: Tensor) -> Tensor:
    """The largest error of a weight stored with these scales, float64."""
    w = weight.abs()
    if spec["format"] == "int8":
        limit = torch.maximum(scale / 2, w - 127 * scale) + 127 * 2.0**-23 * scale
    else:
        relative, underflow, top, largest = FLOAT8_LIMITS[spec["format"]]
        inside = torch.maximum(w * relative, scale * underflow).minimum(scale * top)
        limit = torch.maximum(inside, w - largest * scale)
    return limit * (1 + 1e-6) + w * 2.0**-21


@given(
    kind=st.sampled_from(sorted(KINDS)),
    target=st.sampled_from(sorted(WEIGHTS)),
    rows=st.integers(1, 8),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_what_is_loaded_is_within_the_bound_of_what_was_meant(
    kind: str, target: str, rows: int, groups: int, seed: int
) -> None:
    made = KINDS[kind].build(np.random.default_rng(seed), rows, 4 * groups)
    wanted = KINDS[kind].meaning(made)
    spec = WEIGHTS[target]
    with tempfile.TemporaryDirectory() as name:
        source = save(
            Path(name) / "m.safetensors", {f"a.{role}": tensor for role, tensor in made.items()}
        )
        document = recipe(spec, source=everything(), target=everything())
        out = convert(parsed(document), source, Path(name) / "out", block_bytes=64).out
        scale = load_file(out / "model.safetensors")["a.weight_scale"]
        found = load_state_dict(out)["a.weight"]
        sqnr = read_lock(out)["modules"][0]["error"]["sqnr_db"]
    assert found.dtype == torch.float32
    error = (wanted - found.double()).abs()
    group = group_of(spec, tuple(wanted.shape))
    limit = bound(spec, wanted, spread(scale, tuple(wanted.shape), group))
    assert bool((error <= limit).all()), float((error / limit).max())

    noise = float((wanted.float().double() - found.double()).square().sum())
    if sqnr is not None and noise:
        measured = 10 * np.log10(float(wanted.square().sum()) / noise)
        assert sqnr == pytest.approx(measured, abs=0.006)


@given(
    spec=st.sampled_from(
        ["int8-channel-float32", "int8-group-bfloat16", "float8_e4m3fn-block-float16"]
    ),
    alpha=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 400),
)
@settings(max_examples=25)
def test_smoothing_means_the_same(spec: str, alpha: float, seed: int, size: int) -> None:
    """``(x / s) @ (w s)^T``: activations are divided by the factors that the weight took up."""
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.standard_normal((6, 12))).float()
    weight[:, 3] = 0
    maxima = torch.from_numpy(rng.lognormal(0, 2, (3, 12))).float()
    maxima[:, 5] = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = save(folder / "m.safetensors", {"a.weight": weight})
        save_statistics(folder / "s.safetensors", "model", {"a": maxima})
        scheme = {
            "weight": WEIGHTS[spec],
            "activation": {"format": "int8", "granularity": "token", "dynamic": True},
            "smoothing": {
                "kind": "smoothquant",
                "alpha": alpha,
                "apply": "online",
                "statistics": "s.safetensors",
            },
        }
        path = folder / "recipe.json"
        path.write_text(json.dumps(recipe(target=everything(), schemes={"all": scheme})))
        out = convert(path, source, folder / "out", block_bytes=size).out
        stored = load_file(out / "model.safetensors")
        found = load_state_dict(out)["a.weight"].double()
        codes = load_state_dict(out, names="target")
    assert set(codes) == {"a.weight"}

    factors = stored["a.smoothing"].double()
    largest = maxima.amax(0).double()
    expected = largest**alpha / weight.abs().amax(0).double() ** (1 - alpha)
    expected[[3, 5]] = 1  # not measured, or nothing to move
    torch.testing.assert_close(factors, expected, rtol=1e-6, atol=0)
    smoothed = weight.double() * factors
    group = group_of(WEIGHTS[spec], (6, 12))
    scale = spread(stored["a.weight_scale"], (6, 12), group)
    limit = bound(WEIGHTS[spec], smoothed, scale) / factors
    assert bool(((found - weight.double()).abs() <= limit).all())


@pytest.mark.parametrize("name", ["int8", *FLOAT8])
def test_converting_what_was_loaded_gives_the_same_codes(tmp_path: Path, name: str) -> None:
    weight = torch.from_numpy(np.random.default_rng(5).standard_normal((16, 24))).float()
    spec = WEIGHTS[f"{name}-channel-float32"]
    document = parsed(recipe(spec, target=everything()))
    first = convert(
        document, save(tmp_path / "1.safetensors", {"a.weight": weight}), tmp_path / "1"
    )
    loaded = load_state_dict(first.out)
    second = convert(document, save(tmp_path / "2.safetensors", loaded), tmp_path / "2")
    one, two = (load_file(each.out / "model.safetensors") for each in (first, second))
    assert torch.equal(one["a.weight"].view(torch.uint8), two["a.weight"].view(torch.uint8))
    torch.testing.assert_close(one["a.weight_scale"], two["a.weight_scale"], rtol=1e-6, atol=0)


def test_an_exact_weight_has_no_noise(tmp_path: Path) -> None:
    weight = torch.arange(-127, 128).float().repeat(2, 1)
    source = save(tmp_path / "m.safetensors", {"a.weight": weight, "zero.weight": weight * 0})
    done = convert(parsed(recipe()), source, tmp_path / "out")
    for module in done.lock.modules:
        assert module.error is not None
        assert (module.error.sqnr_db, module.error.max_error_in_scales) == (None, 0)
    with open_checkpoint(done.out) as checkpoint:
        assert torch.equal(checkpoint.weight("a"), weight)
        assert torch.equal(checkpoint.weight("zero"), weight * 0)
