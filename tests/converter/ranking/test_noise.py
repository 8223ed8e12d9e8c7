"""Predicted noise against noise that was measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.converter.activations import as_quantized
from quantrecipe.converter.calibration import ModuleStatistics
from quantrecipe.converter.ranking.noise import (
    WeightColumns,
    largest_squares,
    predicted,
    token_shares,
)
from quantrecipe.formats import dequantize, quantize
from quantrecipe.formats.rotation import rotate_
from quantrecipe.schema.schemes import DynamicActivation, Scheme
from quantrecipe.testing.strategies import GROUP_SIZE
from tests.converter.making import WEIGHTS
from tests.converter.ranking.planted import observed

ACTIVATIONS: dict[str, DynamicActivation | None] = {
    "none": None,
    **{
        f"{fmt}-{granularity}": DynamicActivation.model_validate(
            {"format": fmt, "granularity": granularity, "dynamic": True}
        )
        for fmt in ("int8", "float8_e4m3fn")
        for granularity in ("token", "tensor")
    },
}
IN, OUT, TOKENS = 24 * GROUP_SIZE, 64, 256


def columns_of(weight: Tensor, hat: Tensor) -> WeightColumns:
    return WeightColumns(weight.double().square().sum(0), (hat - weight).double().square().sum(0))


def scheme_weight(name: str) -> Any:
    return Scheme.model_validate({"weight": WEIGHTS[name]}, strict=False).weight


def real(x: Tensor, weight: Tensor, name: str, activation: DynamicActivation | None) -> Any:
    """Signal and noise of the outputs, each the mean over tokens; and the weight as stored."""
    spec = scheme_weight(name)
    found = quantize(weight, spec)
    hat = dequantize(found.codes, found.scale, spec)
    outputs = x.double() @ weight.double().T
    inputs = x if activation is None else as_quantized(x, activation)
    error = inputs.double() @ hat.double().T - outputs
    return outputs.square().sum(1).mean(), error.square().sum(1).mean(), hat


@settings(max_examples=30)
@given(
    st.sampled_from([name for name in WEIGHTS if name.endswith("float32")]),
    st.sampled_from(list(ACTIVATIONS)),
    st.integers(0, 2**32 - 1),
    st.floats(-10, 10),
)
def test_gaussian_noise_is_predicted_to_half_a_decibel(
    weight_name: str, activation_name: str, seed: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator) * 2.0**size
    x = torch.randn(TOKENS, IN, generator=generator)
    activation = ACTIVATIONS[activation_name]
    signal, noise, hat = real(x, weight, weight_name, activation)
    found = predicted(observed(x), columns_of(weight, hat), activation)
    assert found is not None
    assert float(found.signal / signal) == pytest.approx(1, abs=0.12)
    assert float(found.noise / noise) == pytest.approx(1, abs=0.12)


SPIKES = {
    "channels": lambda x: x * torch.where(torch.arange(IN) < 2, 80.0, 1.0),
    "one number in each token": lambda x: x.index_put(
        (torch.arange(TOKENS), torch.arange(TOKENS) % IN), torch.tensor(90.0)
    ),
    "small channels": lambda x: x * torch.where(torch.arange(IN) < 4, 300.0, 0.3),
    "heavy tails": lambda x: x.sinh(),
    "gated": lambda x: torch.nn.functional.silu(2 * x) * x.roll(1, 0).exp(),
}


@pytest.mark.parametrize("spikes", SPIKES)
@pytest.mark.parametrize("activation_name", ["int8-token", "float8_e4m3fn-token"])
def test_with_spikes_noise_is_at_most_overestimated(spikes: str, activation_name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = SPIKES[spikes](torch.randn(TOKENS, IN, generator=generator))
    weight = torch.randn(OUT, IN, generator=generator)
    activation = ACTIVATIONS[activation_name]
    _, noise, hat = real(x, weight, "int8-channel-float32", activation)
    found = predicted(observed(x), columns_of(weight, hat), activation)
    assert found is not None
    # -0.5 dB to 6 dB.
    assert 0.89 < float(found.noise / noise) < 4


def test_for_int8_it_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(TOKENS, IN, generator=generator), torch.randn(OUT, IN)
    statistics = observed(x)
    step = (weight.abs().amax(1) / 127).double()
    # What int8 by row makes of a weight: an error that is uniform within a step.
    columns = WeightColumns(weight.double().square().sum(0), (step.square() / 12).sum().expand(IN))
    found = predicted(statistics, columns, ACTIVATIONS["int8-token"])
    x_step = (x.abs().amax(1) / 127).double().square().mean()
    lengths = x.double().square().sum(1).mean(), weight.double().square().sum(1)
    expected = (step.square() * lengths[0] + x_step * lengths[1]) / 12
    expected += IN * x_step * step.square() / 144
    assert found is not None
    assert float(found.noise) == pytest.approx(float(expected.sum()), rel=1e-6)


@given(st.integers(0, 2**32 - 1), st.sampled_from(list(ACTIVATIONS)))
def test_channels_in_another_order_and_powers_of_two_change_nothing(seed: int, name: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 12, generator=generator).sinh()
    columns = WeightColumns(*torch.rand(2, 12, generator=generator, dtype=torch.float64))
    order = torch.randperm(12, generator=generator)
    first = predicted(observed(x), columns, ACTIVATIONS[name])
    shuffled = WeightColumns(columns.signal[order], columns.noise[order])
    second = predicted(observed(x[:, order] * 8), shuffled, ACTIVATIONS[name])
    assert first is not None
    assert second is not None
    assert first.ratio() == pytest.approx(second.ratio(), rel=1e-9)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.integers(0, 2**32 - 1))
def test_bins_weigh_as_their_tokens_do(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 6, generator=generator)
    columns = WeightColumns(*torch.rand(2, 6, generator=generator, dtype=torch.float64))
    binned = observed(x, [size for size in sizes if size])
    assert float(token_shares(binned).sum()) == pytest.approx(1)
    many = predicted(binned, columns, None)
    one = predicted(observed(x), columns, None)
    assert many is not None
    assert one is not None
    assert many.ratio() == pytest.approx(one.ratio(), rel=1e-9)
    worst, noise = many.worst()
    assert noise >= many.ratio() * (1 - 1e-9)
    assert 0 <= worst < len(many.noise)


def test_smoothing_takes_the_spikes_out_of_the_prediction() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.where(torch.arange(IN) < 3, 100.0, 1.0)
    x = torch.randn(TOKENS, IN, generator=generator) * spread
    activation = ACTIVATIONS["int8-token"]
    assert activation is not None
    before = largest_squares(observed(x), activation, None)
    wanted = (x / spread).abs().amax(1).double().square().mean()
    for keep in (0, 64):
        after = largest_squares(observed(x, keep=keep), activation, spread)
        assert float(after) < float(before) / 1000
        assert float(after / wanted) == pytest.approx(1, abs=0.2 if keep else 0.5)


@pytest.mark.parametrize("activation_name", ACTIVATIONS)
def test_inputs_that_are_all_zero_make_no_noise(activation_name: str) -> None:
    columns = WeightColumns(torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    found = predicted(observed(torch.zeros(3, 4)), columns, ACTIVATIONS[activation_name])
    assert found is not None
    assert found.ratio() == 0
    assert float(found.noise) == 0


def test_without_second_moments_nothing_is_predicted() -> None:
    columns = WeightColumns(torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    assert predicted(ModuleStatistics(input_absmax=torch.ones(1, 4)), columns, None) is None


@pytest.mark.parametrize("keep", [0, 64])
@pytest.mark.parametrize("activation_name", ["none", "int8-token", "float8_e4m3fn-token"])
@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_rotated_inputs_are_predicted_too(spread: float, activation_name: str, keep: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, 256, generator=generator)
    x[:, :3] *= spread
    weight = torch.randn(OUT, 256, generator=generator)
    activation = ACTIVATIONS[activation_name]
    # Smoothed, then rotated.
    factors = torch.rand(256, generator=generator) + 0.5
    turned = rotate_(weight * factors, 64)
    rows = (x / factors).contiguous()
    signal, noise, hat = real(rotate_(rows.clone(), 64), turned, "int8-channel-float32", activation)
    columns = columns_of(turned, hat)
    columns = WeightColumns(
        (weight * factors).double().square().sum(0), columns.noise, columns.signal
    )
    found = predicted(observed(x, keep=keep), columns, activation, factors, 64)
    assert found is not None
    assert float(found.signal / signal) == pytest.approx(1, abs=0.1)
    # The largest of a token is a guess without tokens: 6 dB, and never too good.
    high = 1.2 if keep or activation is None else 4.0
    assert 0.85 < float(found.noise / noise) < high
