"""Block formats held to the packages that write and read them: bits, and where they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantrecipe.formats import Quantized, TwoLevelScales, dequantize, effective_scales, quantize
from quantrecipe.formats.arrangement import swizzle, unswizzle
from quantrecipe.formats.double_quantization import dynamic_map
from quantrecipe.formats.packing import pack
from quantrecipe.schema.schemes import LlmInt8, MxFp4, MxFp8, Nf4, NvFp4, OcpFloor
from quantrecipe.schema.storage import PACKINGS
from quantrecipe.testing.strategies import weights

MXFP8 = MxFp8(format="mxfp8", granularity="group")
MXFP4 = MxFp4(format="mxfp4", granularity="group")
NVFP4 = NvFp4(format="nvfp4", granularity="group")
LLM_INT8 = LlmInt8(format="llm_int8", granularity="channel")
DOUBLE = Nf4(format="nf4", granularity="block", block_size=64, double_quantized=True)
FLOOR = {"quantizer": OcpFloor(kind="ocp-floor")}
HIGH, LOW = PACKINGS["uint8-high-nibble"], PACKINGS["uint8-low-nibble"]
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What bitsandbytes makes of a mean depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def comfy() -> ModuleType:
    module: ModuleType = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    return module


@pytest.fixture(scope="module")
def compressed() -> Any:
    """compressed-tensors' own presets, and its registry of formats."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    def compressor(name: str, preset: str) -> tuple[Any, QuantizationScheme]:
        scheme = preset_name_to_scheme(preset, ["Linear"])
        return BaseCompressor.get_value_from_registry(name), scheme

    return compressor


@pytest.fixture(scope="module")
def bitsandbytes() -> ModuleType:
    module: ModuleType = pytest.importorskip("bitsandbytes.functional")
    return module


def gaussian(*shape: int, seed: int = 1) -> Tensor:
    """Rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(
        2 * torch.randn(shape[0], 1, generator=generator)
    )


def bits(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.contiguous().view(torch.uint8)


def levels_of(stored: Quantized) -> TwoLevelScales:
    assert stored.two_levels is not None
    return stored.two_levels


# The smallest positive float32 numbers times their scales are beneath comfy-kitchen's arithmetic.
MODERATE = st.tuples(st.integers(1, 6), st.integers(1, 3)).flatmap(
    lambda shape: weights((shape[0], 64 * shape[1]), limit=2.0**60)
)


@given(weight=MODERATE)
@settings(max_examples=30, deadline=None)
def test_nvfp4_has_the_bits_of_comfy_kitchen(weight: Tensor, comfy: ModuleType) -> None:
    amax = weight.abs().amax()
    if float(amax) < 2.0**-100:
        return
    over_all = amax / (448.0 * 6.0)
    packed, blocked = comfy.quantize_nvfp4(weight, over_all)
    stored = quantize(weight, NVFP4)
    two_levels = levels_of(stored)
    assert two_levels.second[0] == over_all
    assert torch.equal(bits(swizzle(two_levels.scale)), bits(blocked))
    assert torch.equal(pack(stored.codes, HIGH), packed)
    theirs = comfy.dequantize_nvfp4(packed, over_all, blocked, torch.float32)
    assert torch.equal(theirs, dequantize(stored.codes, stored.scale, NVFP4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp8_has_the_bits_of_comfy_kitchen(dtype: torch.dtype, comfy: ModuleType) -> None:
    weight = (gaussian(130, 288) * 1e-2).to(dtype)
    weight[5], weight[6, 32:64] = 0, 0
    weight[7] = torch.arange(-144, 144) / 4
    data, blocked = comfy.quantize_mxfp8(weight)
    stored = quantize(weight, MXFP8)
    assert stored.scale is not None
    assert torch.equal(bits(swizzle(stored.scale)), bits(blocked))
    assert torch.equal(bits(stored.codes), bits(data))
    theirs = comfy.dequantize_mxfp8(data, blocked, torch.float32)
    assert torch.equal(theirs, dequantize(stored.codes, stored.scale, MXFP8))


def test_every_bfloat16_maximum_has_the_exponent_of_comfy_kitchen(comfy: ModuleType) -> None:
    every = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    # Their logarithm is of float32 and takes smaller numbers for 2^-127.
    normal = every[every.float() >= 2.0**-117]
    weight = torch.zeros(len(normal), 32, dtype=torch.bfloat16)
    weight[:, 3] = normal
    _, blocked = comfy.quantize_mxfp8(weight)
    theirs = unswizzle(blocked, len(normal), 1)
    assert torch.equal(bits(theirs), bits(quantize(weight, MXFP8).scale))


def test_where_comfy_kitchen_differs(comfy: ModuleType) -> None:
    """Just above 448 scales: their logarithm does not see it, and the number is clamped."""
    weight = torch.zeros(1, 32)
    weight[0, 0] = torch.nextafter(torch.tensor(448.0 * 2**20), torch.tensor(math.inf))
    _, blocked = comfy.quantize_mxfp8(weight)
    assert int(bits(blocked)[0, 0]) == 127 + 20
    assert bits(quantize(weight, MXFP8).scale).item() == 127 + 21
    # And zeros of a block of zeros lose their sign.
    data, _ = comfy.quantize_mxfp8(torch.full((1, 32), -0.0))
    assert int(bits(data).count_nonzero()) == 0
    assert bool((bits(quantize(torch.full((1, 32), -0.0), MXFP8).codes) == 0x80).all())


@pytest.mark.parametrize("update", [{}, FLOOR], ids=["absmax", "floor"])
def test_mxfp4_is_read_and_rounded_so_by_compressed_tensors(
    update: dict[str, Any], compressed: Any
) -> None:
    compressor, scheme = compressed("mxfp4-pack-quantized", "MXFP4A16")
    weight = gaussian(40, 128) * 1e-2
    weight[3] = torch.arange(-64, 64) / 4
    weight[weight == 0] = 0
    spec = MXFP4.model_copy(update=update)
    stored = quantize(weight, spec)
    assert stored.scale is not None
    packed = pack(stored.codes, LOW)
    given = {"weight_packed": packed, "weight_scale": bits(stored.scale)}
    theirs = compressor.decompress(given, scheme)["weight"]
    assert torch.equal(theirs.float(), dequantize(stored.codes, stored.scale, spec))
    found = compressor.compress({"weight": weight, "weight_scale": stored.scale.float()}, scheme)
    assert torch.equal(found["weight_packed"], packed)
    assert torch.equal(found["weight_scale"], bits(stored.scale))


@pytest.mark.parametrize("update", [{}, FLOOR], ids=["absmax", "floor"])
def test_mxfp8_is_read_and_rounded_so_by_compressed_tensors(
    update: dict[str, Any], compressed: Any
) -> None:
    compressor, scheme = compressed("mxfp8-quantized", "MXFP8A16")
    weight = gaussian(40, 128) * 1e-2
    spec = MXFP8.model_copy(update=update)
    stored = quantize(weight, spec)
    assert stored.scale is not None
    given = {"weight": stored.codes, "weight_scale": bits(stored.scale)}
    theirs = compressor.decompress(given, scheme)["weight"]
    assert torch.equal(theirs.float(), dequantize(stored.codes, stored.scale, spec))
    found = compressor.compress({"weight": weight, "weight_scale": stored.scale.float()}, scheme)
    assert torch.equal(bits(found["weight"]), bits(stored.codes))
    assert torch.equal(found["weight_scale"], bits(stored.scale))


def test_nvfp4_has_the_bits_of_compressed_tensors_under_a_power_of_two(compressed: Any) -> None:
    """Then dividing by what they store is multiplying by what we do."""
    compressor, scheme = compressed("nvfp4-pack-quantized", "NVFP4A16")
    weight = gaussian(40, 128)
    weight[7, 9] = 2688 * 2.0**-5
    weight = weight.clamp(-2688 * 2.0**-5, 2688 * 2.0**-5)
    stored = quantize(weight, NVFP4)
    two_levels = levels_of(stored)
    assert two_levels.second.tolist() == [2.0**-5]
    divisor = two_levels.second.reciprocal()
    packed = pack(stored.codes, LOW)
    given = {
        "weight_packed": packed,
        "weight_scale": two_levels.scale,
        "weight_global_scale": divisor,
    }
    theirs = compressor.decompress(given, scheme)["weight"]
    assert torch.equal(theirs, dequantize(stored.codes, stored.scale, NVFP4, "bfloat16"))
    given = {"weight": weight, "weight_scale": two_levels.scale.float()}
    found = compressor.compress(given | {"weight_global_scale": divisor}, scheme)
    assert torch.equal(found["weight_packed"], packed)


def test_nvfp4_of_compressed_tensors_is_within_two_roundings(compressed: Any) -> None:
    from compressed_tensors.quantization.lifecycle.forward import dequantize as theirs_of

    _, scheme = compressed("nvfp4-pack-quantized", "NVFP4A16")
    codes = torch.arange(16, dtype=torch.uint8).repeat(8, 8)
    scale = bits(torch.arange(1, 65, dtype=torch.uint8).view(8, 8)).view(torch.float8_e4m3fn)
    for divisor in (3.7, 1234.5, 0.011):
        stored = torch.tensor([divisor])
        levels = TwoLevelScales(scale, stored.reciprocal(), None)
        ours = dequantize(codes, effective_scales(levels, NVFP4), NVFP4)
        unscaled = dequantize(codes, torch.ones(8, 8), NVFP4)
        theirs = theirs_of(unscaled, scale.float(), args=scheme.weights, global_scale=stored)
        assert not torch.equal(ours, theirs)
        assert bool(((ours - theirs).abs() <= 2.0**-22 * theirs.abs()).all())


def test_the_8_bit_map_is_that_of_bitsandbytes(bitsandbytes: ModuleType) -> None:
    assert torch.equal(dynamic_map(), bitsandbytes.create_dynamic_map())


def assert_nested(weight: Tensor, bitsandbytes: ModuleType) -> None:
    packed, state = bitsandbytes.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    stored = quantize(weight, DOUBLE)
    two_levels = levels_of(stored)
    assert torch.equal(pack(stored.codes, HIGH).reshape(-1, 1), packed)
    assert torch.equal(two_levels.scale.flatten(), state.absmax)
    assert torch.equal(two_levels.second, state.state2.absmax)
    assert two_levels.offset is not None
    assert two_levels.offset[0] == state.offset
    name = str(weight.dtype).removeprefix("torch.")
    ours = dequantize(stored.codes, stored.scale, DOUBLE, name)  # type: ignore[arg-type]
    assert torch.equal(bitsandbytes.dequantize_4bit(packed, state), ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 192), (70, 256), (257, 320), (600, 4096)], ids=str)
def test_double_quantized_nf4_has_the_bits_of_bitsandbytes(
    shape: tuple[int, int], dtype: str, bitsandbytes: ModuleType
) -> None:
    """Blocks of 256 scales, a short last one, and more than one thread adds at once."""
    weight = gaussian(*shape).clamp(-6e4, 6e4)
    if shape[0] > 8:
        weight[5], weight[6, :64] = 0, 0
        weight[7] *= 1e-6
    assert_nested(weight.to(getattr(torch, dtype)), bitsandbytes)


@pytest.mark.parametrize("number", [0.0, 0.5])
def test_equal_scales_have_the_bits_of_bitsandbytes(
    number: float, bitsandbytes: ModuleType
) -> None:
    assert_nested(torch.full((70, 256), number), bitsandbytes)


@given(weight=MODERATE)
@settings(max_examples=20, deadline=None)
def test_any_double_quantized_nf4(weight: Tensor, bitsandbytes: ModuleType) -> None:
    if float(weight.abs().amax()) > 2.0**-100:
        assert_nested(weight, bitsandbytes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_llm_int8_has_the_bits_of_bitsandbytes(dtype: str, bitsandbytes: ModuleType) -> None:
    weight = gaussian(70, 256).clamp(-6e4, 6e4).to(getattr(torch, dtype))
    weight[5] = torch.arange(-128, 128) / 2
    codes, scale, _ = bitsandbytes.int8_vectorwise_quant(weight)
    stored = quantize(weight, LLM_INT8)
    assert stored.scale is not None
    assert torch.equal(stored.codes, codes)
    assert torch.equal(stored.scale.flatten(), scale)
    back = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, scale)
    assert torch.equal(dequantize(stored.codes, stored.scale, LLM_INT8), back)


def test_every_float16_of_llm_int8(bitsandbytes: ModuleType) -> None:
    """All finite values, in rows whose maxima are all of them once."""
    every = torch.arange(0x7C00, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    weight = torch.cat([every.flip(0), -every]).view(62, 1024)
    rows = torch.stack([every[1:], every[1:] / 3, -every[1:] / 7, every[1:] * 0.498], 1)
    for part in (weight, rows):
        codes, scale, _ = bitsandbytes.int8_vectorwise_quant(part)
        stored = quantize(part, LLM_INT8)
        assert stored.scale is not None
        assert torch.equal(stored.codes, codes)
        assert torch.equal(stored.scale.flatten(), scale)
