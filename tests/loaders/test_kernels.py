"""Every kernel against the reference, and against what W8A8 may lose at most."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats import dequantize, quantize
from quantrecipe.formats.rotation import rotate_
from quantrecipe.loaders import QuantizedLinear
from quantrecipe.loaders.kernels import (
    AUTO,
    AUTO_OR_DEQUANTIZED,
    LinearCall,
    choose,
    choosing,
    find_kernel,
    int_mm,
    kernel_names,
    on_cpu,
)
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.schemes import (
    AnyScaledWeight,
    DynamicActivation,
    Float8Block,
    Float8Channel,
    Float8Tensor,
    Int8Channel,
    Int8Group,
    Int8Tensor,
)

THIRD_PARTY = Path(__file__).parents[1] / "converter" / "third_party"
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CHANNEL = Int8Channel(format="int8", granularity="channel")
BY_ROW: list[AnyScaledWeight] = [
    CHANNEL,
    Int8Tensor(format="int8", granularity="tensor"),
    Int8Channel(format="int8", granularity="channel", scale_dtype="bfloat16"),
]
FORMATS: list[AnyScaledWeight] = [
    *BY_ROW,
    Int8Group(format="int8", granularity="group", group_size=1),
    Int8Group(format="int8", granularity="group", group_size=3),
    Float8Channel(format="float8_e4m3fn", granularity="channel"),
    Float8Channel(format="float8_e5m2", granularity="channel"),
    Float8Tensor(format="float8_e4m3fn", granularity="tensor"),
    Float8Block(format="float8_e4m3fn", granularity="block", block_size=(5, 7)),
    Float8Block(format="float8_e5m2", granularity="block", block_size=(1, 2)),
]
ACTIVATIONS = ["int8:token", "int8:tensor", "float8_e4m3fn:token", "float8_e4m3fn:tensor"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROUND_OFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
TINY = {  # half the distance of the smallest numbers, and what arithmetic may flush to zero
    torch.float64: 2.0**-126,
    torch.float32: 2.0**-126,
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-126,
}
INEXACT = {"dequantized"}
"""The kernels whose W8A8 sums are not those of the codes to the last bit."""


@dataclass(frozen=True)
class Case:
    """A call with everything that goes into it, and the weight before it was quantized."""

    x: Tensor
    original: Tensor
    spec: AnyScaledWeight
    codes: Tensor
    scale: Tensor
    smoothing: Tensor | None
    bias: Tensor | None
    activation: str
    rotation: int = 0

    def call(self) -> LinearCall:
        out_features, in_features = self.codes.shape
        return LinearCall(
            rows=self.x.numel() // in_features,
            out_features=out_features,
            in_features=in_features,
            dtype=self.x.dtype,
            device=self.x.device,
            code_dtype=self.codes.dtype,
            scale_dtype=self.scale.dtype,
            group=self.spec.group_shape(out_features, in_features),
            activation=self.activation,
            smoothing=self.smoothing is not None,
            rotation=self.rotation,
            bias=self.bias is not None,
        )

    def kernels(self) -> list[str]:
        call = self.call()
        return [name for name in kernel_names() if find_kernel(name).refuses(call) is None]

    def run(self, kernel: str) -> Tensor:
        result: Tensor = torch.ops.quantrecipe.linear(
            self.x,
            self.codes,
            self.scale,
            self.smoothing,
            self.bias,
            self.rotation,
            list(self.call().group),
            self.activation,
            kernel,
        )
        assert result.shape == (*self.x.shape[:-1], self.codes.shape[0])
        assert result.dtype == self.x.dtype
        assert result.is_contiguous()
        return result

    def rows(self) -> Tensor:
        """What the weight is multiplied by, float64 ``[rows, in]``."""
        values = self.x.reshape(-1, self.codes.shape[1]).float()
        values = (values if self.smoothing is None else values / self.smoothing).double()
        return rotate_(values.contiguous(), self.rotation) if self.rotation else values

    def rotating(self) -> Tensor:
        """How far float32 rotates ``rows`` from what they are, float64 ``[rows, in]``."""
        x = self.x.reshape(-1, self.codes.shape[1]).double()
        if not self.rotation:
            return torch.zeros_like(x)
        x = (x if self.smoothing is None else x / self.smoothing).abs()
        sums = x.view(len(x), -1, self.rotation).sum(-1) / self.rotation**0.5
        # By butterflies; a library adds one after the other.
        additions = 2 * math.log(self.rotation, 4) if x.device.type == "cpu" else self.rotation
        error: Tensor = sums.repeat_interleave(self.rotation, 1) * additions * 2.0**-23
        return error + 2.0**-148

    def weight(self) -> Tensor:
        """The numbers that the codes stand for, float64."""
        return dequantize(self.codes, self.scale, self.spec).double()


def made(
    *,
    rows: int | tuple[int, ...] = 4,
    out_features: int = 5,
    in_features: int = 24,
    spec: AnyScaledWeight = CHANNEL,
    activation: str = "int8:token",
    dtype: torch.dtype = torch.float32,
    strides: str = "contiguous",
    values: str = "normal",
    bias: torch.dtype | None = torch.float32,
    smoothing: bool = False,
    rotation: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    random = torch.Generator().manual_seed(seed)
    leading = (rows,) if isinstance(rows, int) else rows
    x = VALUES[values](torch.randn(*leading, in_features, generator=random, dtype=torch.float64))
    original = torch.randn(out_features, in_features, generator=random) / math.sqrt(in_features)
    stored = quantize(original, spec)
    assert stored.scale is not None
    factors = torch.rand(in_features, generator=random) + 0.5
    added = torch.randn(out_features, generator=random)
    return Case(
        x=STRIDES[strides](x.to(dtype).to(device)),
        original=original.to(device),
        spec=spec,
        codes=stored.codes.to(device),
        scale=stored.scale.to(device),
        smoothing=factors.to(device) if smoothing else None,
        bias=None if bias is None else added.to(device, bias),
        activation=activation,
        rotation=rotation,
    )


def outliers(x: Tensor) -> Tensor:
    x[..., 0] *= 1000.0
    return x


def some_zero_rows(x: Tensor) -> Tensor:
    x.view(-1, x.shape[-1])[::2] = 0.0
    return x


def one_for_all(x: Tensor) -> Tensor:
    return torch.full_like(x, -3.7)


VALUES = {
    "normal": lambda x: x,
    "huge": lambda x: x * 1e30,
    "subnormal": lambda x: x * 1e-40,
    "small": lambda x: x * 2.0**-12,
    "outliers": outliers,
    "zero rows": some_zero_rows,
    "constant": one_for_all,
}


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def sliced_columns(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan)
    wide[..., 1::2][..., : x.shape[-1]] = x
    return wide[..., 1::2][..., : x.shape[-1]]


def sliced_rows(x: Tensor) -> Tensor:
    tall = x.new_full((x.shape[0] * 3, *x.shape[1:-1], x.shape[-1] + 5), torch.nan)
    tall[::3, ..., 2:-3] = x
    return tall[::3, ..., 2:-3]


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


STRIDES = {
    "contiguous": lambda x: x,
    "transposed": transposed,
    "columns": sliced_columns,
    "rows": sliced_rows,
    "expanded": expanded,
}


@st.composite
def cases(draw: st.DrawFn, weights: list[AnyScaledWeight], activations: list[str]) -> Case:
    dtype = draw(st.sampled_from(DTYPES))
    spec = draw(st.sampled_from(weights))
    in_features = draw(st.one_of(st.sampled_from([1, 8, 64, 128]), st.integers(1, 300)))
    if spec.granularity == "group":
        in_features *= spec.group_size
    rotation = draw(st.sampled_from([0, 0, 4, 16, 64]))
    if rotation:
        step = math.lcm(rotation, getattr(spec, "group_size", 1))
        in_features = step * -(-in_features // step)
    values = sorted(VALUES if dtype != torch.float16 else set(VALUES) - {"huge", "subnormal"})
    return made(
        rows=draw(
            st.one_of(
                st.sampled_from([1, 2, 16, 17, 33]),
                st.integers(1, 40),
                st.tuples(st.integers(1, 4), st.integers(1, 9)),
            )
        ),
        out_features=draw(st.one_of(st.sampled_from([1, 8, 64]), st.integers(1, 70))),
        in_features=in_features,
        spec=spec,
        activation=draw(st.sampled_from(activations)),
        dtype=dtype,
        strides=draw(st.sampled_from(sorted(STRIDES))),
        values=draw(st.sampled_from(values)),
        bias=draw(st.sampled_from([None, *DTYPES])),
        smoothing=draw(st.booleans()),
        rotation=rotation,
        seed=draw(st.integers(0, 2**32)),
        device=draw(st.sampled_from(DEVICES)),
    )


def written(case: Case, exact: Tensor) -> Tensor:
    """How far from ``exact``, float64, a result may be that was rounded once more."""
    rounding = ROUND_OFF[case.x.dtype] * exact.abs()
    if case.bias is not None:  # added in float32, to what may cancel with it
        bias = case.bias.double()
        rounding = rounding + 2.0**-23 * (bias.abs() + (exact - bias).abs())
    return rounding + TINY[case.x.dtype]


def activation_scales(rows: Tensor, activation: str) -> Tensor:
    largest = rows.abs().amax(1, keepdim=True)
    if activation.endswith("tensor"):
        largest = largest.amax().expand_as(largest)
    return torch.where(largest == 0, 1.0, (largest / 127).clamp(min=2.0**-126))


@given(cases(BY_ROW, ["int8:token", "int8:tensor"]))
def test_w8a8_loses_no_more_than_rounding_activations_and_weights_does(case: Case) -> None:
    x, w = case.rows(), case.original.double()
    s_x = activation_scales(x, case.activation)
    s_w = case.scale.double().T
    product = x @ w.T
    bound = (s_w * x.abs().sum(1, keepdim=True) + s_x * w.abs().sum(1)) / 2
    bound = (bound + x.shape[1] * s_x * s_w / 4) * (1 + 4e-5)
    if case.spec.scale_dtype == "bfloat16":  # the largest weight may be clamped by what it rounds
        largest = w.abs().amax(1)
        bound = bound + (largest - 127 * s_w).clamp(min=0) * (x.abs() + s_x / 2).sum(
            1, keepdim=True
        )
    exact = product if case.bias is None else product + case.bias.double()
    # Scaling rounds three times in float32, and adds to what the output's dtype rounds.
    bound = bound * (1 + 2 * ROUND_OFF[case.x.dtype]) + 3 * 2.0**-24 * product.abs()
    bound = bound + written(case, exact) + 2 * case.rotating() @ (w.abs() + s_w.T).T
    names = case.kernels()
    assert {"reference", "dequantized"} <= set(names)
    assert case.x.device.type != "cpu" or "int_mm" in names
    for name in names:
        more = inexact(case, x, w.abs() + s_w.T / 2, s_x) if name in INEXACT else 0.0
        error = (case.run(name).reshape(exact.shape).double() - exact).abs()
        assert (error <= bound + more).all(), (name, (error / (bound + more)).max())


def inexact(case: Case, x: Tensor, w: Tensor, s_x: Tensor | float = 0.0) -> Tensor:
    """What products and sums in the activations' dtype add, with weights of magnitudes ``w``."""
    unit = max(ROUND_OFF[case.x.dtype], 2.0**-24)
    magnitudes = x.abs() + s_x
    products = magnitudes @ w.abs().T
    ends = magnitudes.sum(1, keepdim=True) + w.abs().sum(1)
    bias = torch.zeros(()) if case.bias is None else case.bias.double().abs()
    sums = (x.shape[1] + 8) * 2.0**-23
    return (3 * unit + sums) * products + 2 * unit * (products + bias) + TINY[case.x.dtype] * ends


@given(cases(FORMATS, ACTIVATIONS))
def test_kernels_agree_with_the_reference(case: Case) -> None:
    expected = case.run("reference").double()
    x, w = case.rows(), case.weight()
    close = expected.flatten(0, -2) if expected.ndim > 1 else expected[None]
    sums = 3 * 2.0**-24 * (close if case.bias is None else close - case.bias.double()).abs()
    tight = 2 * written(case, close) + 2 * sums + 2.0**-126 * w.abs().sum(1)
    loose = tight + inexact(case, x, w, activation_scales(x, case.activation))
    # A library may rotate in another order: then codes differ, and the bound above is all.
    assume(case.x.device.type == "cpu" or not case.rotation)
    exact = case.call().is_w8a8
    for name in case.kernels():
        bound = tight if exact and name not in INEXACT else loose
        error = (case.run(name).reshape(close.shape).double() - close).abs()
        assert (error <= bound).all(), (name, (error / bound).max())


@given(cases(FORMATS, [""]))
def test_weight_only_is_the_product_with_what_codes_stand_for(case: Case) -> None:
    x, w = case.rows(), case.weight()
    exact = x @ w.T
    exact = exact if case.bias is None else exact + case.bias.double()
    bound = written(case, exact) + inexact(case, x, w) + case.rotating() @ w.abs().T
    for name in case.kernels():
        error = (case.run(name).reshape(exact.shape).double() - exact).abs()
        assert (error <= bound).all(), (name, (error / bound).max())


def adversarial(shape: tuple[int, int], pattern: str, seed: int) -> Tensor:
    """int8 codes whose sums are as large as they can be, or cancel."""
    columns = shape[1]
    full = torch.full(shape, 127, dtype=torch.int8)
    if pattern == "negative":
        return -full
    if pattern == "alternating":
        full[:, 1::2] = -127
    if pattern == "lowest":
        full[:] = -128
    if pattern == "halves":
        full[:, columns // 2 :] = -127
    if pattern == "random":
        full = torch.randint(
            -127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed)
        )
        full[:, 0] = 127
    return full


PATTERNS = ["positive", "negative", "alternating", "halves", "random"]


@given(
    rows=st.sampled_from([1, 3, 17]),
    out_features=st.sampled_from([1, 8, 17]),
    in_features=st.one_of(
        st.integers(1, 300), st.sampled_from([1023, 1024, 1025, 1040, 2048, 4608, 20_000])
    ),
    activations=st.sampled_from(PATTERNS),
    weights=st.sampled_from([*PATTERNS, "lowest"]),
    granularity=st.sampled_from(["token", "tensor"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
    device=st.sampled_from(DEVICES),
)
def test_sums_of_codes_are_exact(
    rows: int,
    out_features: int,
    in_features: int,
    activations: str,
    weights: str,
    granularity: str,
    dtype: torch.dtype,
    seed: int,
    device: str,
) -> None:
    a = adversarial((rows, in_features), activations, seed)
    w = adversarial((out_features, in_features), weights, seed + 1)
    case = replace(
        made(out_features=out_features, in_features=in_features, bias=None, device=device),
        x=a.to(device, dtype),
        codes=w.to(device),
        scale=torch.ones(out_features, 1, device=device),
        activation=f"int8:{granularity}",
    )
    expected = (a.long() @ w.long().T).float()
    for name in set(case.kernels()) - INEXACT:
        assert torch.equal(case.run(name).float().cpu(), expected), name


@given(case=cases(BY_ROW, ["int8:token"]), data=st.data())
def test_a_row_does_not_depend_on_the_rows_beside_it(case: Case, data: st.DataObject) -> None:
    x = case.x.reshape(-1, case.codes.shape[1])
    chosen = data.draw(st.integers(0, x.shape[0] - 1))
    for name in set(case.kernels()) - INEXACT:
        together = replace(case, x=x).run(name)
        alone = replace(case, x=x[chosen : chosen + 1]).run(name)
        assert torch.equal(together[chosen : chosen + 1], alone), name


@pytest.mark.parametrize("features", [7, 31, 42, 64, 127])
def test_what_is_no_number_stays_in_its_row_in_16_bits(features: int) -> None:
    """Odd widths, where the products of processors look beyond the end of a row."""
    linear = QuantizedLinear(features, 8, CHANNEL, bias=False, kernel="dequantized")
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-127, 128, (8, features)))
        assert linear.weight_scale is not None
        linear.weight_scale.fill_(0.01)
    x = torch.full((33, features), -3.7, dtype=torch.bfloat16)
    x[1] = torch.nan
    result = linear(x)
    assert not result[1].isfinite().any()
    assert result[[row for row in range(33) if row != 1]].isfinite().all()


@given(
    case=cases(BY_ROW, ["int8:token"]),
    poison=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    data=st.data(),
)
def test_what_is_no_number_stays_in_its_row(case: Case, poison: float, data: st.DataObject) -> None:
    x = case.x.reshape(-1, case.codes.shape[1]).clone()
    row = data.draw(st.integers(0, x.shape[0] - 1))
    column = data.draw(st.integers(0, x.shape[1] - 1))
    others = [index for index in range(x.shape[0]) if index != row]
    poisoned = x.clone()
    poisoned[row, column] = poison
    for name in case.kernels():
        result = replace(case, x=poisoned).run(name)
        assert not result[row].isfinite().any(), name
        if name not in INEXACT:
            assert torch.equal(result[others], replace(case, x=x).run(name)[others]), name
        assert result[others].isfinite().all(), name


@pytest.mark.parametrize("activation", ["int8:tensor", "float8_e4m3fn:tensor"])
@pytest.mark.parametrize("device", DEVICES)
def test_by_tensor_no_result_is_a_number_then(device: str, activation: str) -> None:
    case = made(rows=24, out_features=8, activation=activation, device=device)
    case.x[3, 2] = torch.nan
    for name in case.kernels():
        assert not case.run(name).isfinite().any(), name


@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_zeros_give_the_bias(device: str, activation: str) -> None:
    case = made(rows=20, out_features=8, activation=activation, values="zero rows", device=device)
    assert case.bias is not None
    for name in case.kernels():
        result = case.run(name)[::2]
        assert torch.equal(result, case.bias.expand_as(result)), name


# int_mm, the ways it goes elsewhere, and the borders of its blocks.


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, granularity: str) -> None:
    case = made(
        rows=23, out_features=19, in_features=77, activation=f"int8:{granularity}", smoothing=True
    )
    whole = case.run("int_mm")
    monkeypatch.setattr(on_cpu, "_WEIGHTS", 1)
    for rows, weights, run in [(1, 1, 1), (4, 5, 7), (22, 18, 64), (23, 6, 77)]:
        monkeypatch.setattr(int_mm, "_ROWS", rows)
        monkeypatch.setattr(on_cpu, "_FEWEST", weights)
        monkeypatch.setattr(int_mm, "_RUN", run)
        assert torch.equal(case.run("int_mm"), whole)


@pytest.mark.parametrize("kernel", ["int_mm", "dequantized"])
def test_what_inference_mode_made_serves_without_it(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    monkeypatch.setattr(on_cpu, "_kept", threading.local())
    case = made(bias=None)
    with torch.inference_mode():
        inside = case.run(kernel)
    assert torch.equal(case.run(kernel), inside)


@pytest.mark.parametrize("kernel", ["int_mm", "dequantized"])
def test_threads_do_not_share_what_they_work_in(kernel: str) -> None:
    each = [made(rows=3, out_features=96, in_features=300, seed=seed) for seed in range(4)]
    expected = [case.run(kernel) for case in each]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = pool.map(lambda case: case.run(kernel), each)
            assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("spec", FORMATS, ids=repr)
@pytest.mark.parametrize("weights", [1, 4, 11])
def test_dequantized_blocks_hold_whole_groups(
    monkeypatch: pytest.MonkeyPatch, spec: AnyScaledWeight, weights: int
) -> None:
    case = made(rows=3, out_features=17, spec=spec, activation="", dtype=torch.float64)
    whole = case.run("dequantized")
    monkeypatch.setattr(on_cpu, "_WEIGHTS", 1)
    monkeypatch.setattr(on_cpu, "_FEWEST", weights)
    torch.testing.assert_close(case.run("dequantized"), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_the_library_and_float32_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    case = made(rows=rows, out_features=16, in_features=1200)
    results = []
    for library in (False, True):
        monkeypatch.setattr(int_mm, "multiplies", lambda dtype, answer=library: answer)
        results.append(case.run("int_mm"))
    assert torch.equal(*results)


def test_one_feature_is_nothing_for_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    case = made(rows=3, out_features=8, in_features=1)
    monkeypatch.setattr(int_mm, "multiplies", lambda dtype: False)
    expected = case.run("int_mm")

    def garbage(a: Tensor, b: Tensor) -> Tensor:
        return torch.full((a.shape[0], b.shape[1]), 1 << 30, dtype=torch.int32)

    monkeypatch.setattr(int_mm, "multiplies", lambda dtype: True)
    monkeypatch.setattr(torch, "_int_mm", garbage)
    assert torch.equal(case.run("int_mm"), expected)


def test_the_library_is_given_the_strides_of_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch._int_mm

    def strict(a: Tensor, b: Tensor) -> Tensor:
        assert a.stride() == (8, 1)
        assert b.stride() == (1, 8)
        return real(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)
    values = torch.arange(16.0).reshape(8, 2).T[:1]
    weight = torch.ones(2, 8, dtype=torch.int8).as_strided((1, 8), (1, 1))
    assert int_mm._by_library(values, weight, 1).tolist() == [[56]]


@pytest.mark.parametrize("rows", [1, 16, 32, 33])
def test_few_rows_are_made_more_for_cuda(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    seen = []
    real = torch._int_mm

    def as_on_cuda(a: Tensor, b: Tensor) -> Tensor:
        assert a.shape[0] > 16
        seen.append(a.shape[0])
        return real(a, b)

    monkeypatch.setattr(torch, "_int_mm", as_on_cuda)
    values = torch.randint(-127, 128, (rows, 24)).float()
    weight = torch.randint(-127, 128, (8, 24), dtype=torch.int8)
    result = int_mm._by_library(values, weight, int_mm._CUDA_ROWS)
    assert torch.equal(result, (values @ weight.float().T).int())
    assert seen == [-(-rows // 32) * 32]


def on_cuda(**changes: Any) -> LinearCall:
    call = replace(
        made(rows=2048, out_features=16, in_features=32).call(), device=torch.device("cuda")
    )
    return replace(call, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"in_features": 20}, "multiples of 16"),
        ({"out_features": 17, "group": (1, 32)}, "multiples of 16"),
        ({"in_features": 131_072, "group": (1, 131_072)}, "no more than 131071"),
        ({"device": torch.device("meta")}, "does not run on meta"),
        ({"activation": ""}, "int8 codes"),
        ({"activation": "float8_e4m3fn:token"}, "int8 codes"),
        ({"code_dtype": torch.float8_e5m2}, "int8 codes"),
        ({"group": (1, 8)}, "a scale for each row"),
    ],
)
def test_what_int_mm_refuses(changes: dict[str, Any], says: str | None) -> None:
    reason = find_kernel("int_mm").refuses(on_cuda(**changes))
    assert reason is None if says is None else says in (reason or "")


# Which kernel computes a call.


@pytest.fixture(autouse=True)
def nothing_chosen_yet() -> Iterator[None]:
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.mark.parametrize("able", [True, False])
def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    monkeypatch.setattr(choosing, "multiplies", lambda dtype: able)
    expected = {AUTO: "int_mm", AUTO_OR_DEQUANTIZED: "int_mm" if able else "dequantized"}
    for name, taken in expected.items():
        assert choose(made().call(), name).name == taken
        assert choose(made(activation="").call(), name).name == "dequantized"
        assert choose(made(activation="float8_e4m3fn:token").call(), name).name == "dequantized"


@pytest.mark.parametrize(
    ("capability", "rows", "faster"),
    [((9, 0), 4096, False), ((10, 0), 4096, True), ((12, 0), 4096, True), ((10, 0), 16, False)],
)
def test_numerics_change_only_where_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], rows: int, faster: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    call = on_cuda(rows=rows)
    assert (choose(call, AUTO_OR_DEQUANTIZED).name == "dequantized") == faster
    if faster:
        with pytest.warns(UserWarning, match=r"auto\+dequantized"):
            assert choose(call, AUTO).name != "dequantized"
    else:
        assert choose(call, AUTO).name != "dequantized"


def test_one_that_refuses_says_why() -> None:
    module = QuantizedLinear(4, 4, CHANNEL, kernel="int_mm")
    with pytest.raises(InvalidInput, match="int8 codes") as error:
        module(torch.ones(1, 4))
    (problem,) = error.value.problems
    assert problem.kind == "kernel-refuses"
    assert problem.hint == 'kernel="auto" takes one that can.'


# Kernels of other projects.


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(THIRD_PARTY))


@pytest.mark.usefixtures("installed")
def test_another_projects_kernel_is_found_and_computes() -> None:
    assert {"transposing", "reference"} <= set(kernel_names())
    case = made(activation="", smoothing=True)
    assert find_kernel("transposing").refuses(case.call()) is None
    torch.testing.assert_close(case.run("transposing"), case.run("reference"))
    token = DynamicActivation(format="int8", granularity="token", dynamic=True)
    with pytest.raises(InvalidInput, match="it takes no activation formats"):
        QuantizedLinear(4, 4, CHANNEL, token, kernel="transposing")(torch.ones(1, 4))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("gone", "broken-entry-point", "No module named 'someones_tools.nowhere'"),
        ("shapeless", "not-a-kernel", "lacks a name, a refuses or a linear method"),
        ("transposin", "unknown-kernel", "Did you mean 'transposing'?"),
    ],
)
def test_one_that_is_none_is_named(name: str, kind: str, says: str) -> None:
    with pytest.raises(InvalidInput) as error:
        find_kernel(name)
    assert error.value.problems[0].kind == kind
    assert says in str(error.value)


def test_two_of_one_name_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "rivals-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rivals\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quantrecipe.kernels]\nint_mm = rivals:Kernel\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InvalidInput) as error:
        kernel_names()
    assert error.value.problems[0].kind == "duplicate-entry-point"
    assert "rivals" in str(error.value)


def test_without_their_package_they_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(THIRD_PARTY)])
    assert "transposing" not in kernel_names()
