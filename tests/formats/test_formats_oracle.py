"""Codes, scales and decoded values equal an independent NumPy implementation's, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantrecipe.formats import (
    NonFinite,
    ScaleOutOfRange,
    cast,
    dequantize,
    get_format,
    quantize,
)


def as_bytes(tensor: torch.Tensor) -> bytes:
    data: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return data


def agree(weight: torch.Tensor, spec: Any, oracle: Any) -> None:
    array = weight.numpy()
    group = spec.group_shape(*array.shape)
    grid = oracle.scales(array, group, spec.format, spec.scale_dtype)
    each = oracle.spread(grid, group, array.shape)
    codes = oracle.encode(array, each, spec.format)

    stored = quantize(weight, spec)

    assert stored.scale is not None
    assert as_bytes(stored.scale) == oracle.scale_bytes(grid, spec.scale_dtype)
    assert as_bytes(stored.codes) == codes.tobytes()
    decoded = dequantize(stored.codes, stored.scale, spec)
    assert as_bytes(decoded) == oracle.decode(codes, each, spec.format).tobytes()


@given(data=st.data())
@settings(max_examples=250)
def test_agrees_with_numpy(data: st.DataObject, kit: Any) -> None:
    weight, spec = data.draw(kit.cases())
    agree(weight, spec, kit.oracle)


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 values, ``[512, 128]``: a sign and a magnitude range a row."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).view(512, 128)


@pytest.mark.parametrize("transposed", [False, True], ids=["by-range", "mixed"])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_16_bit_value(
    source: torch.dtype, fmt: str, scale_dtype: str, transposed: bool, kit: Any
) -> None:
    spec = kit.spec(fmt, "channel", scale_dtype)
    every = patterns(source)
    weight = every[every.isfinite().all(1)].float()
    weight = weight.T.contiguous() if transposed else weight
    amax = weight.abs().amax(1)
    fits = amax.double() / get_format(spec).largest_code < (
        65520 if scale_dtype == "float16" else 1e40
    )
    assert bool(fits.any()) or transposed
    if not bool(fits.all()):
        with pytest.raises(ScaleOutOfRange) as refused:
            quantize(weight, spec)
        assert refused.value.index == (int((~fits).nonzero()[0]), 0)
    if bool(fits.any()):
        agree(weight[fits].contiguous(), spec, kit.oracle)


@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_non_finite_16_bit_value_is_refused(source: torch.dtype, fmt: str, kit: Any) -> None:
    every = patterns(source).flatten()
    spec = kit.spec(fmt)
    poisons = every[~every.isfinite()]
    assert len(poisons) == {torch.bfloat16: 256, torch.float16: 2048}[source]
    for place, poison in enumerate(poisons):
        row, column = divmod(place % 15, 5)
        weight = torch.ones(3, 5, dtype=source)
        weight[row, column] = poison
        with pytest.raises(NonFinite) as refused:
            quantize(weight, spec)
        assert refused.value.index == (row, column)


@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "float8_e5m2"])
def test_every_fp8_code_decodes_to_its_value(fmt: str, kit: Any) -> None:
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) < kit.oracle.FLOAT8[fmt].finite_codes][None, :]
    tensor = torch.from_numpy(codes).view(getattr(torch, fmt))
    decoded = dequantize(tensor, torch.ones(1, 1), kit.spec(fmt))
    assert as_bytes(decoded) == kit.oracle.code_values(codes, fmt).tobytes()


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_golden_bytes(name: str, kit: Any) -> None:
    golden = json.loads((kit.oracle.GOLDEN / f"{name}.json").read_text())
    weight = read(golden["weight"], golden["shape"])
    assert len(golden["cases"]) == 9
    for case in golden["cases"]:
        spec = kit.read_spec(case["spec"])
        stored = quantize(weight, spec)
        assert stored.scale is not None
        assert as_bytes(stored.scale).hex() == case["scale"], case["spec"]
        assert as_bytes(stored.codes).hex() == case["codes"], case["spec"]
        decoded = dequantize(stored.codes, stored.scale, spec)
        assert as_bytes(decoded).hex() == case["decoded"], case["spec"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_golden_bytes_of_plain_dtypes(dtype: Any, kit: Any) -> None:
    golden = json.loads((kit.oracle.GOLDEN / "plain.json").read_text())
    weight = read(golden["weight"], golden["shape"])
    assert as_bytes(cast(weight, dtype)).hex() == golden[dtype]


def read(text: str, shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytes.fromhex(text), "<f4").reshape(shape).copy())
