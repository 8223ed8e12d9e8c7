"""ComfyUI: what comfy-kitchen wrote is read, and comfy-kitchen reads what is written here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantrecipe.converter import convert
from quantrecipe.evaluate import verify
from quantrecipe.formats import dequantize, quantize
from quantrecipe.loaders import load_model, load_state_dict, open_checkpoint
from quantrecipe.schema.markers import COMFYUI_KEY
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.schemes import Int8Channel
from quantrecipe.schema.validation import parse_recipe
from tests.support.goldens import (
    GOLDEN,
    Json,
    Tensors,
    awkward,
    expected,
    metadata,
    same,
    source,
    written,
)

OUT = "layers.0.attention.o"
W1, W2, W3 = (f"layers.0.feed_forward.{name}" for name in ("w1", "w2", "w3"))
TOKENS = Int8Channel(format="int8", granularity="channel")

SCHEMES: dict[str, Json] = {
    "int8-tensor": {"weight": {"format": "int8", "granularity": "tensor"}},
    "int8-row": {"weight": {"format": "int8", "granularity": "channel"}},
    "int8-convrot": {
        "weight": {"format": "int8", "granularity": "channel"},
        "rotation": {"kind": "hadamard", "size": 256},
    },
    "fp8-e4m3": {"weight": {"format": "float8_e4m3fn", "granularity": "tensor"}},
    "fp8-e5m2": {"weight": {"format": "float8_e5m2", "granularity": "tensor"}},
    "nvfp4": {"weight": {"format": "nvfp4", "granularity": "group"}},
    "mxfp8": {"weight": {"format": "mxfp8", "granularity": "group"}},
}
"""The schemes that the layout holds, by the name of the golden file of each."""

MARKERS: dict[str, Json] = {
    "int8-tensor": {"format": "int8_tensorwise"},
    "int8-row": {"format": "int8_tensorwise"},
    "int8-convrot": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
    "fp8-e4m3": {"format": "float8_e4m3fn"},
    "fp8-e5m2": {"format": "float8_e5m2"},
    "nvfp4": {"format": "nvfp4"},
    "mxfp8": {"format": "mxfp8"},
}

KERNELS: dict[str, tuple[str, Json]] = {
    "int8-tensor": ("TensorWiseINT8Layout", {}),
    "int8-row": ("TensorWiseINT8Layout", {"per_channel": True}),
    "int8-convrot": (
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 256},
    ),
    "fp8-e4m3": ("TensorCoreFP8Layout", {"dtype": torch.float8_e4m3fn}),
    "fp8-e5m2": ("TensorCoreFP8Layout", {"dtype": torch.float8_e5m2}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
}
"""What quantizes so in comfy-kitchen: a class, and what ``QuantizedTensor.from_float`` is told."""

# One row; one tile of 128 rows; a row more; two and a half tiles by more than 4 blocks.
ANY = {"one": (1, 256), "tile": (128, 256), "over": (129, 512)}
WHOLE = {"least": (32, 32), "tile": (128, 64), "over": (160, 256), "wide": (320, 544)}

every = pytest.mark.parametrize("name", SCHEMES)


def made(name: str, folder: Path) -> tuple[Path, Tensors, Tensors]:
    """A checkpoint of ours: its file, its tensors and the weights that it was made from."""
    shapes = ANY if name.startswith(("int8", "fp8")) else WHOLE
    weights = {
        f"{module}.weight": awkward(*shape, seed)
        for seed, (module, shape) in enumerate(shapes.items())
    }
    weights["tile.bias"] = torch.linspace(-1, 1, 128)
    path, tensors = written(folder, "comfyui", SCHEMES[name], weights)
    return path, tensors, weights


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, Tensors, Tensors]]:
    return {name: made(name, tmp_path_factory.mktemp(name)) for name in SCHEMES}


@pytest.fixture(scope="module")
def comfy() -> Any:
    return pytest.importorskip("comfy_kitchen.tensor")


def loaded(
    comfy: Any, tensors: Tensors, module: str, shape: tuple[int, int], dtype: torch.dtype
) -> Any:
    """A weight as ComfyUI's loader builds it: the marker says which class, the model its shape."""
    said = json.loads(bytes(tensors[f"{module}.comfy_quant"].tolist()))
    kind, weight = said["format"], tensors[f"{module}.weight"]
    scale = tensors[f"{module}.weight_scale"]
    common: Json = {"orig_dtype": dtype, "orig_shape": shape}
    if kind == "int8_tensorwise":
        layout = comfy.TensorWiseINT8Layout
        rotation = {key: said[key] for key in ("convrot", "convrot_groupsize") if key in said}
        params = layout.Params(scale=scale, **common, **rotation)
    elif kind == "nvfp4":
        layout = comfy.TensorCoreNVFP4Layout
        second = tensors[f"{module}.weight_scale_2"]
        params = layout.Params(scale=second, block_scale=scale, **common)
    else:
        assert kind in ("mxfp8", "float8_e4m3fn", "float8_e5m2")
        layout = comfy.TensorCoreMXFP8Layout if kind == "mxfp8" else comfy.TensorCoreFP8Layout
        params = layout.Params(scale=scale, **common)
    made: Any = comfy.QuantizedTensor(weight, layout.__name__, params)
    return made


def hadamard(size: int) -> Tensor:
    """float64 ``[size, size]``."""
    of_four = torch.ones(4, 4, dtype=torch.float64)
    of_four[[0, 1, 2, 3], [3, 2, 1, 0]] = -1
    whole = torch.ones(1, 1, dtype=torch.float64)
    while whole.shape[0] < size:
        whole = torch.kron(whole, of_four)
    whole /= size**0.5
    return whole


def assert_unrotated(found: Tensor, theirs: Tensor, rotated: Tensor, size: int) -> None:
    """Both are the weight rotated back, each within the roundings of its way of adding.

    ``found`` is added in steps of four (docs/formats.md), ``theirs`` by a float32 matrix product
    in whatever order.
    """
    groups = rotated.double().view(rotated.shape[0], -1, size)
    exact = (groups @ hadamard(size)).flatten(1)
    magnitude = groups.abs().sum(-1, keepdim=True).expand(groups.shape).flatten(1) / size**0.5
    unit, steps = 2.0**-24, size.bit_length() - 1
    assert bool(((found - exact).abs() <= ((1 + unit) ** steps - 1) * magnitude).all())
    assert bool(((theirs - exact).abs() <= 1.01 * size * unit * magnitude).all())


# What they wrote


def read(name: str, module: str) -> Tensor:
    path = GOLDEN / f"comfyui-{name}.safetensors"
    return load_state_dict(path, layout="comfyui")[f"{module}.weight"]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        *((name, module) for name in ("int8-tensor", "int8-row") for module in (OUT, W1, W2)),
        *((name, module) for name in ("fp8-e4m3", "fp8-e5m2") for module in (OUT, W1, W2)),
        ("int8-convrot", W2),
        ("nvfp4", OUT),
        ("mxfp8", OUT),
    ],
)
def test_their_weights_are_read_to_the_bit(name: str, module: str) -> None:
    assert same(read(name, module), expected(f"comfyui-{name}")[module])


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_scales_may_be_called_bytes(name: str, tmp_path: Path) -> None:
    """ComfyUI takes them for what they are."""
    path = GOLDEN / f"comfyui-{name}.safetensors"
    tensors = {
        key: each.view(torch.uint8) if key.endswith("weight_scale") else each
        for key, each in load_file(path).items()
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata(path))
    found = load_state_dict(tmp_path / "model.safetensors", layout="comfyui")
    assert same(found[f"{OUT}.weight"], expected(f"comfyui-{name}")[OUT])


def test_a_marker_may_say_in_its_params_how_it_is_rotated(tmp_path: Path) -> None:
    path = GOLDEN / "comfyui-int8-convrot.safetensors"
    tensors = load_file(path)
    said = json.loads(bytes(tensors[f"{OUT}.comfy_quant"].tolist()))
    said = {"params": said | {"format": "of nobody"}, "format": said["format"]}
    marker = list(json.dumps(said).encode())
    tensors[f"{OUT}.comfy_quant"] = torch.tensor(marker, dtype=torch.uint8)
    save_file(tensors, tmp_path / "a.safetensors", metadata(path))
    with (
        open_checkpoint(path, layout="comfyui") as before,
        open_checkpoint(tmp_path / "a.safetensors", layout="comfyui") as after,
    ):
        assert after.module(OUT).rotation == before.module(OUT).rotation
        assert same(after.weight(OUT), before.weight(OUT))


@pytest.mark.parametrize(
    "said",
    [
        {"convrot": True},
        {"format": "int8_tensorwise", "convrot": True},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 100},
        {"format": "int8_tensorwise", "convrot": 1, "convrot_groupsize": 64},
        {"format": "float8_e4m3fn"},
        {"format": "convrot_w4a4"},
    ],
    ids=str,
)
def test_markers_that_do_not_say_enough_are_refused(said: Json, tmp_path: Path) -> None:
    path = GOLDEN / "comfyui-int8-convrot.safetensors"
    marker = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    tensors = load_file(path) | {f"{OUT}.comfy_quant": marker}
    save_file(tensors, tmp_path / "a.safetensors", metadata(path))
    with pytest.raises(InvalidInput, match="it says"):
        open_checkpoint(tmp_path / "a.safetensors", layout="comfyui")


@pytest.mark.parametrize(("module", "size"), [(OUT, 64), (W1, 256)])
def test_their_rotated_weights_are_read(module: str, size: int) -> None:
    path = GOLDEN / "comfyui-int8-convrot.safetensors"
    with open_checkpoint(path, layout="comfyui") as checkpoint:
        rotation = checkpoint.module(module).rotation
        assert rotation is not None
        assert rotation.size == size
        rows = checkpoint.rows(module, None, 0, checkpoint.module(module).out_features)
        found = checkpoint.weight(module)
    assert_unrotated(found, expected("comfyui-int8-convrot")[module], rows, size)


@pytest.mark.parametrize(
    ("name", "module", "stored"),
    [("mxfp8", W1, (32, 256)), ("mxfp8", W2, (64, 64)), ("nvfp4", W3, (144, 80))],
)
def test_what_they_filled_up_and_no_bias_shows_is_read_with_its_zeros(
    name: str, module: str, stored: tuple[int, int]
) -> None:
    wanted, found = expected(f"comfyui-{name}")[module], read(name, module)
    assert tuple(found.shape) == stored
    rows, columns = wanted.shape
    assert same(found[:rows, :columns], wanted)
    assert not found[rows:].any()
    assert not found[:, columns:].any()


def test_a_bias_shows_which_rows_they_filled_up() -> None:
    path = GOLDEN / "comfyui-mxfp8.safetensors"
    with open_checkpoint(path, layout="comfyui") as checkpoint:
        module = checkpoint.module(OUT)
        assert (module.out_features, module.in_features) == (48, 64)
        assert module.tensors["weight"].shape == (48, 64)
    stored = load_file(path)[f"{OUT}.weight"]
    assert stored.shape == (64, 64)
    assert not stored[48:].view(torch.uint8).any()


@pytest.mark.parametrize("converter", ["streaming", "reference"])
def test_what_is_left_of_it_is_converted_like_any_weight(converter: str, tmp_path: Path) -> None:
    """Carried over as it is, or quantized again."""
    path = GOLDEN / "comfyui-mxfp8.safetensors"
    document: Json = {
        "kind": "recipe",
        "version": 1,
        "name": "small",
        "source": {"layout": "comfyui"},
        "schemes": {},
        "rules": [],
        "target": {"layout": "compressed-tensors", "passthrough_dtype": "keep"},
    }
    convert(
        parse_recipe(json.dumps(document), "test"), path, tmp_path / "kept", converter=converter
    )
    stored, found = load_file(path), load_file(next((tmp_path / "kept").glob("*.safetensors")))
    assert same(found[f"{OUT}.weight"], stored[f"{OUT}.weight"][:48].contiguous())
    assert found[f"{OUT}.weight_scale"].shape == (48, 2)
    weight = expected("comfyui-mxfp8")[OUT]
    assert same(load_state_dict(tmp_path / "kept")[f"{OUT}.weight"], weight)
    assert not verify(tmp_path / "kept", against=path).problems
    document |= {
        "schemes": {"all": SCHEMES["int8-row"]},
        "rules": [{"modules": ["**.{o,w1,w2}"], "scheme": "all"}],
    }
    convert(
        parse_recipe(json.dumps(document | {"target": {"layout": "comfyui"}}), "test"),
        path,
        tmp_path / "int8",
        converter=converter,
    )
    found = load_file(next((tmp_path / "int8").glob("*.safetensors")))
    assert same(found[f"{OUT}.weight"], quantize(weight, TOKENS).codes)
    assert not verify(tmp_path / "int8", against=path).problems


@pytest.mark.parametrize("rows", [1, 31, 32, 65])
def test_a_bias_of_another_size_is_refused(rows: int, tmp_path: Path) -> None:
    """32 rows would not have been filled up to 64."""
    path = GOLDEN / "comfyui-mxfp8.safetensors"
    tensors = load_file(path) | {f"{OUT}.bias": torch.zeros(rows)}
    save_file(tensors, tmp_path / "a.safetensors", metadata(path))
    with pytest.raises(InvalidInput, match="has shape"):
        open_checkpoint(tmp_path / "a.safetensors", layout="comfyui")


def test_what_they_filled_up_fits_no_model_of_the_true_shape(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 48, bias=False)

    stored = load_file(GOLDEN / "comfyui-mxfp8.safetensors")
    tensors = {key.replace(OUT, "a"): each for key, each in stored.items() if key.startswith(OUT)}
    del tensors["a.bias"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InvalidInput, match=r"\[64, 64\]"):
        load_model(Model(), tmp_path / "a.safetensors", layout="comfyui")


@pytest.mark.parametrize("name", ["fp8-e4m3", "nvfp4"])
def test_weights_of_zeros_whose_scale_they_make_0_are_refused(
    name: str, comfy: Any, tmp_path: Path
) -> None:
    """They decode to NaN."""
    kernels, told = KERNELS[name]
    zeros = comfy.QuantizedTensor.from_float(torch.zeros(32, 32), kernels, **told)
    assert bool(zeros.dequantize().isnan().all())
    tensors = zeros.state_dict("a.weight")
    marker = list(json.dumps(MARKERS[name]).encode())
    tensors["a.comfy_quant"] = torch.tensor(marker, dtype=torch.uint8)
    save_file(tensors, tmp_path / "a.safetensors")
    with (
        open_checkpoint(tmp_path / "a.safetensors", layout="comfyui") as checkpoint,
        pytest.raises(InvalidInput, match=r"no number|NaN"),
    ):
        checkpoint.weight("a")


# What the older ComfyUI wrote


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_legacy_scaled_fp8_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    """``scale_weight``, ``scale_input``, and an empty tensor that says which fp8."""
    codes = (source()[f"{OUT}.weight"].float() * 8).to(dtype)
    scale = torch.tensor(0.0123)
    tensors = {
        "scaled_fp8": torch.empty(0, dtype=dtype),
        "a.weight": codes,
        "a.scale_weight": scale,
        "a.scale_input": torch.tensor(1.0),
        "a.bias": torch.ones(48),
        "b.weight": codes[:5].clone(),
        "b.scale_weight": scale.repeat(1),
        "norm.weight": torch.ones(4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = load_state_dict(tmp_path / "model.safetensors", layout="fp8-scaled")
    assert found.keys() == {"a.weight", "a.bias", "b.weight", "norm.weight"}
    # code.to(dtype) * scale.to(dtype), as comfy-kitchen and its forerunners compute it.
    assert same(found["a.weight"], codes.float() * scale)
    assert same(found["b.weight"], codes[:5].float() * scale)


# What they read


@every
def test_markers_are_theirs(name: str, ours: Any) -> None:
    path, tensors, _ = ours[name]
    said = json.dumps(MARKERS[name]).encode()
    markers = [key for key in tensors if key.endswith(".comfy_quant")]
    assert len(markers) == len([key for key in tensors if key.endswith(".weight")])
    for key in markers:
        assert tensors[key].dtype == torch.uint8
        assert bytes(tensors[key].tolist()) == said
    assert len(said) == {"int8-convrot": 72}.get(name, len(said))
    header = json.loads(metadata(path)[COMFYUI_KEY])
    assert header["format_version"] == "1.0"
    layers = {key.removesuffix(".comfy_quant"): MARKERS[name] for key in markers}
    assert header["layers"] == layers
    # ComfyUI makes markers of these entries again, which take the place of the tensors.
    assert all(json.dumps(each).encode() == said for each in header["layers"].values())


def test_markers_of_their_files_are_what_ours_would_be() -> None:
    for name, marker in MARKERS.items():
        tensors = load_file(GOLDEN / f"comfyui-{name}.safetensors")
        markers = {bytes(each.tolist()) for key, each in tensors.items() if "comfy_quant" in key}
        assert name == "fp8-e5m2" or json.dumps(marker).encode() in markers


@every
def test_scales_have_the_shapes_they_ask_for(name: str, ours: Any) -> None:
    _, tensors, weights = ours[name]
    for key, weight in weights.items():
        if not key.endswith(".weight"):
            continue
        scale = tensors[f"{key}_scale"]
        if name in ("nvfp4", "mxfp8"):
            wanted = torch.float8_e4m3fn if name == "nvfp4" else torch.float8_e8m0fnu
        else:
            wanted = torch.float32
            channel = name in ("int8-row", "int8-convrot")
            # In a square weight, [out] would be taken for a scale of every column.
            assert tuple(scale.shape) == ((weight.shape[0], 1) if channel else ())
        assert scale.dtype == wanted
        assert (f"{key}_scale_2" in tensors) == (name == "nvfp4")
        assert same(tensors["tile.bias"], weights["tile.bias"])


@every
def test_they_read_the_same_numbers(name: str, comfy: Any, ours: Any) -> None:
    path, tensors, weights = ours[name]
    found = load_state_dict(path)
    with open_checkpoint(path) as checkpoint:
        for key, weight in weights.items():
            if not key.endswith(".weight"):
                continue
            module, shape = key.removesuffix(".weight"), tuple(weight.shape)
            theirs = loaded(comfy, tensors, module, shape, torch.float32).dequantize()
            if name == "int8-convrot":
                rows = checkpoint.rows(module, None, 0, shape[0])
                assert_unrotated(found[key], theirs, rows, 256)
            else:
                assert same(found[key], theirs)


@every
def test_they_read_the_same_numbers_in_bfloat16(name: str, comfy: Any, ours: Any) -> None:
    """What ComfyUI computes in as a rule: some of its formats round scales first."""
    path, tensors, weights = ours[name]
    found, half = load_state_dict(path), torch.bfloat16
    for key, weight in weights.items():
        if not key.endswith(".weight"):
            continue
        module, shape = key.removesuffix(".weight"), tuple(weight.shape)
        theirs = loaded(comfy, tensors, module, shape, half).dequantize()
        scale = tensors[f"{key}_scale"]
        if name.startswith("fp8"):
            # Code and scale are cast, then multiplied.
            assert same(theirs, tensors[key].to(half) * scale.to(half))
            assert within(theirs, found[key], 2.0**-7)
        elif name == "nvfp4":
            # Scales are multiplied in bfloat16, then levels.
            assert within(theirs, found[key], 3 * 2.0**-8)
        elif name == "int8-convrot":
            assert within(theirs, found[key], 2.0**-8 + 2.0**-15, 2.0**-12)
        else:
            assert same(theirs, found[key].to(half))


def within(theirs: Tensor, wanted: Tensor, relative: float, absolute: float = 0.0) -> bool:
    gap = (theirs.double() - wanted.double()).abs()
    return bool((gap <= relative * wanted.double().abs() + absolute).all())


def test_the_least_exponent_of_mxfp8_is_0_to_them(comfy: Any, tmp_path: Path) -> None:
    """Byte 0 is 2^-127 in the specification, and here."""
    weight = torch.zeros(32, 32)
    weight[0] = 448 * 2.0**-127
    weight[1, 0] = 2.0**-118
    weight[2] = -0.0
    path, tensors = written(tmp_path, "comfyui", SCHEMES["mxfp8"], {"a.weight": weight})
    found = load_state_dict(path)["a.weight"]
    assert torch.equal(found, weight)
    theirs = loaded(comfy, tensors, "a", (32, 32), torch.float32).dequantize()
    assert torch.equal(theirs[1], weight[1])
    assert not theirs[[0, 2]].any()


@pytest.mark.parametrize("name", ["int8-tensor", "int8-row"])
def test_their_int8_linear_computes_with_our_codes(name: str, comfy: Any, ours: Any) -> None:
    """Every bit, from whole sums of codes."""
    _, tensors, weights = ours[name]
    for module, bias in (("one", None), ("tile", "tile.bias"), ("over", None)):
        weight = weights[f"{module}.weight"]
        inputs = awkward(6, weight.shape[1], 9).view(2, 3, -1)
        layer = loaded(comfy, tensors, module, tuple(weight.shape), torch.float32)
        found = nn.functional.linear(inputs, layer, None if bias is None else tensors[bias])
        given = quantize(inputs.flatten(0, 1), TOKENS)
        assert given.scale is not None
        sums = given.codes.double() @ tensors[f"{module}.weight"].double().T
        scales = given.scale * tensors[f"{module}.weight_scale"].reshape(1, -1)
        wanted = sums.float() * scales
        wanted = wanted if bias is None else wanted + tensors[bias]
        assert same(found.flatten(0, 1), wanted)


def test_their_rotated_int8_linear_computes_with_our_codes(comfy: Any, ours: Any) -> None:
    """Activations are rotated too: the errors are those of their codes, in the rotated basis."""
    path, tensors, weights = ours["int8-convrot"]
    for module in ("one", "tile", "over"):
        weight = weights[f"{module}.weight"]
        inputs = awkward(6, weight.shape[1], 9)
        layer = loaded(comfy, tensors, module, tuple(weight.shape), torch.float32)
        bias = tensors.get(f"{module}.bias")
        found = nn.functional.linear(inputs[None], layer, bias)[0].double()
        turned = (inputs.double().view(inputs.shape[0], -1, 256) @ hadamard(256)).flatten(1)
        step = turned.abs().amax(1, keepdim=True) / 127
        rows = tensors[f"{module}.weight"].double() * tensors[f"{module}.weight_scale"].double()
        wanted = turned @ rows.T + (0 if bias is None else bias.double())
        bound = step * rows.abs().sum(1) / 2 * (1 + 1e-4) + 2.0**-22 * wanted.abs()
        assert bool(((found - wanted).abs() <= bound).all())
        # It is the product with the weight that we read.
        dense = load_state_dict(path)[f"{module}.weight"].double()
        plain = inputs.double() @ dense.T + (0 if bias is None else bias.double())
        torch.testing.assert_close(wanted, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fp8-e4m3", "fp8-e5m2", "nvfp4", "mxfp8"])
def test_their_linear_computes_with_our_codes(name: str, comfy: Any, ours: Any) -> None:
    """On a CPU, with the weight that they dequantize."""
    path, tensors, weights = ours[name]
    weight = weights["tile.weight"]
    inputs, bias = awkward(6, weight.shape[1], 9).view(2, 3, -1), tensors["tile.bias"]
    layer = loaded(comfy, tensors, "tile", tuple(weight.shape), torch.float32)
    found = nn.functional.linear(inputs, layer, bias)
    wanted = nn.functional.linear(inputs, load_state_dict(path)["tile.weight"], bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# What they would have written


@every
def test_they_would_have_written_the_same_bytes(name: str, comfy: Any, ours: Any) -> None:
    """From the same float32 weights, but for what is said here."""
    _, tensors, weights = ours[name]
    kernels, told = KERNELS[name]
    for key, weight in weights.items():
        if not key.endswith(".weight"):
            continue
        theirs = comfy.QuantizedTensor.from_float(weight, kernels, **told).state_dict(key)
        mine = {part: tensors[part] for part in theirs}
        assert sum(part.startswith(key) for part in tensors) == len(theirs)
        if name in ("int8-tensor", "nvfp4", "mxfp8"):
            assert all(same(mine[part], each) for part, each in theirs.items())
        elif name == "int8-row":
            assert same(mine[key], theirs[key])
            # A row of zeros: 1 here, 1e-30 there.
            zeros = ~weight.any(1, keepdim=True)
            scale = theirs[f"{key}_scale"].masked_fill(zeros, 1.0)
            assert same(mine[f"{key}_scale"], scale)
        elif name == "int8-convrot":
            # Rotated by a matrix product: sums are rounded otherwise.
            gap = mine[key].int() - theirs[key].int()
            assert int(gap.abs().max()) <= 1
            assert float(gap.abs().float().mean()) < 0.001
            zeros = ~weight.any(1, keepdim=True)
            scale = theirs[f"{key}_scale"].masked_fill(zeros, 1.0)
            torch.testing.assert_close(mine[f"{key}_scale"], scale, rtol=2e-6, atol=0)
        else:
            # Multiplied by the reciprocal of the scale, where ours are divided.
            assert same(mine[f"{key}_scale"], theirs[f"{key}_scale"])
            largest = torch.finfo(mine[key].dtype).max
            by_inverse = weight * (1 / mine[f"{key}_scale"])
            codes = by_inverse.clamp(-largest, largest).to(mine[key].dtype)
            assert same(theirs[key], codes)
            by_division = weight / mine[f"{key}_scale"]
            codes = by_division.clamp(-largest, largest).to(mine[key].dtype)
            assert same(mine[key], codes)


@every
def test_shapes_that_they_fill_up_are_refused(name: str, tmp_path: Path) -> None:
    """Where nothing in a file would tell how much is the weight."""
    weights = {
        "a.weight": awkward(
            48 if name != "nvfp4" else 50, {"mxfp8": 288, "nvfp4": 272}.get(name, 264)
        )
    }
    if name in ("mxfp8", "nvfp4"):
        with pytest.raises(InvalidInput, match="holds shapes of multiples of"):
            written(tmp_path, "comfyui", SCHEMES[name], weights)
        assert not (tmp_path / "out").exists()
    elif name == "int8-convrot":
        with pytest.raises(InvalidInput, match="rotat"):
            written(tmp_path, "comfyui", SCHEMES[name], weights)
    else:
        path, tensors = written(tmp_path, "comfyui", SCHEMES[name], weights)
        assert tensors["a.weight"].shape == (48, 264)
        stored = quantize(weights["a.weight"], TOKENS)
        if name == "int8-row":
            assert same(tensors["a.weight"], stored.codes)
            wanted = dequantize(stored.codes, stored.scale, TOKENS)
            assert same(load_state_dict(path)["a.weight"], wanted)
