"""What the public strategies draw: all that is allowed, nothing that is not, and the awkward."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from quantrecipe.converter import convert
from quantrecipe.formats import quantize
from quantrecipe.loaders import load_state_dict
from quantrecipe.schema.capabilities import BUILT_IN, missing, needs
from quantrecipe.schema.recipe import Recipe
from quantrecipe.schema.schemes import AnyWeight, PlainWeight, ScaledWeight, Scheme
from quantrecipe.testing import strategies
from tests.converter.making import result_of, save

PLAIN = ("float64", "float32", "float16", "bfloat16")
TINY = float(torch.finfo(torch.float32).tiny)


@given(spec=strategies.weight_specs(), data=st.data())
def test_a_spec_takes_the_shapes_that_are_drawn_for_it(
    spec: AnyWeight, data: st.DataObject
) -> None:
    rows, columns = data.draw(strategies.linear_shapes(spec, max_rows=7, max_columns=70))
    assert spec.refuses(rows, columns) is None
    assert 1 <= rows <= 7
    assert 1 <= columns <= 70


@pytest.mark.parametrize(
    ("fmt", "granularity"),
    [(name, granularity) for name, all_of in strategies.SCALED.items() for granularity in all_of],
)
def test_every_format_is_drawn(fmt: str, granularity: str) -> None:
    spec = find(strategies.weight_specs(), lambda s: getattr(s, "granularity", None) == granularity)
    assert isinstance(spec, ScaledWeight)
    assert find(strategies.weight_specs(formats=[fmt]), lambda s: s.format == fmt).format == fmt


@given(
    shape=strategies.linear_shapes(),
    dtype=st.sampled_from(PLAIN),
    limit=st.sampled_from([1.0, 2.0**15, 3.4e38]),
    data=st.data(),
)
def test_weights_are_finite_and_within_the_limit(
    shape: tuple[int, int], dtype: str, limit: float, data: st.DataObject
) -> None:
    weight = data.draw(strategies.weights(shape, limit=limit, dtype=dtype))
    assert (weight.shape, weight.dtype) == (shape, getattr(torch, dtype))
    assert bool(weight.isfinite().all())
    assert float(weight.double().abs().max()) <= limit


AWKWARD: dict[str, Callable[[Tensor], bool]] = {
    "a row of zeros": lambda w: bool((w == 0).all(1).any() and (w != 0).any()),
    "a negative zero": lambda w: bool(((w == 0) & w.signbit()).any()),
    "subnormal": lambda w: bool(((w != 0) & (w.abs() < TINY)).any()),
    "huge": lambda w: bool((w.abs() > 1e37).any()),
    "an outlier": lambda w: bool((w.abs().amax(1) > 50 * w.abs().median(1).values).any()),
    "a tie": lambda w: bool(((w.abs().amax(1) == 127) & ((w % 1).abs() == 0.5).any(1)).any()),
}


@pytest.mark.parametrize("what", AWKWARD)
def test_awkward_weights_are_drawn(what: str) -> None:
    found = find(
        strategies.weights((3, 6)),
        AWKWARD[what],
        settings=settings(max_examples=2000, derandomize=True, database=None),
    )
    assert AWKWARD[what](found)


@given(strategies.quantizable())
def test_what_is_quantizable_is_quantized(drawn: tuple[Tensor, ScaledWeight]) -> None:
    weight, spec = drawn
    scale = quantize(weight, spec).scale
    assert scale is not None
    assert bool(scale.float().isfinite().all())


@given(strategies.activations(5, dtype="bfloat16", max_tokens=3))
def test_activations_are_finite(x: Tensor) -> None:
    assert x.dtype == torch.bfloat16
    assert x.shape[1] == 5
    assert 1 <= x.shape[0] <= 3
    assert bool(x.isfinite().all())


def test_activations_have_spikes_and_rows_of_zeros() -> None:
    spiky = find(strategies.activations(6), lambda x: bool(x.abs().max() > 100))
    assert float(spiky.abs().median()) < 10
    assert find(strategies.activations(6), lambda x: bool((x == 0).all(1).any())).shape[1] == 6


@given(strategies.schemes(statistics="s.safetensors"))
def test_schemes_hold_to_the_schema(scheme: Scheme) -> None:
    assert Scheme.model_validate_json(json.dumps(scheme.to_json_value())) == scheme
    if isinstance(scheme.weight, PlainWeight):
        assert scheme.activation is None
        assert scheme.smoothing is None


@given(drawn=strategies.conversions(), block_bytes=st.integers(1, 400))
@settings(max_examples=30)
def test_conversions_can_be_carried_out(
    drawn: tuple[Recipe, dict[str, Tensor]], block_bytes: int
) -> None:
    recipe, tensors = drawn
    assert not missing(BUILT_IN, needs(recipe, []))
    with tempfile.TemporaryDirectory() as name:
        source = save(Path(name) / "m.safetensors", tensors)
        one = convert(recipe, source, Path(name) / "one", converter="reference").out
        two = convert(recipe, source, Path(name) / "two", block_bytes=block_bytes).out
        assert result_of(one) == result_of(two)
        loaded = load_state_dict(one)
        assert {n: t.shape for n, t in loaded.items()} == {n: t.shape for n, t in tensors.items()}
        assert load_file(one / "model.safetensors").keys() >= tensors.keys()
