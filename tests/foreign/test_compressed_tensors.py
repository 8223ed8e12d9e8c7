"""compressed-tensors: what it wrote is read, and it reads what is written here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quantrecipe.converter import convert
from quantrecipe.formats import get_format
from quantrecipe.formats.packing import pack
from quantrecipe.loaders import load_state_dict, open_checkpoint
from quantrecipe.schema.schemes import Int8Channel, MxFp4, MxFp8, NvFp4, ScaledWeight
from quantrecipe.schema.storage import PACKINGS
from quantrecipe.schema.validation import parse_recipe
from tests.foreign.make_golden import transformers_model
from tests.loaders.converted import library
from tests.support.goldens import (
    GOLDEN,
    Json,
    Tensors,
    awkward,
    expected,
    same,
    source,
    with_config,
    written,
)

LAYOUT = "compressed-tensors"
DYNAMIC: Json = {"granularity": "token", "dynamic": True}
INT8_TOKENS: Json = {"format": "int8", **DYNAMIC}
FP8_TOKENS: Json = {"format": "float8_e4m3fn", **DYNAMIC}


def block(size: int, **more: Any) -> Json:
    return {"granularity": "group", "group_size": size, **more}


SCHEMES: dict[str, Json] = {
    "int8": {"weight": {"format": "int8", "granularity": "channel"}, "activation": INT8_TOKENS},
    "int8-weights": {"weight": {"format": "int8", "granularity": "channel"}},
    "int8-bfloat16": {
        "weight": {"format": "int8", "granularity": "channel", "scale_dtype": "bfloat16"}
    },
    "fp8-channel": {
        "weight": {"format": "float8_e4m3fn", "granularity": "channel"},
        "activation": FP8_TOKENS,
    },
    "fp8-tensor": {"weight": {"format": "float8_e4m3fn", "granularity": "tensor"}},
    "fp8-block": {
        "weight": {"format": "float8_e4m3fn", "granularity": "block", "block_size": [128, 128]}
    },
    "int4": {"weight": {"format": "int4", **block(32)}},
    "int4-zeros": {"weight": {"format": "int4", **block(32, symmetric=False)}},
    "mxfp4": {"weight": {"format": "mxfp4", **block(32)}},
    "mxfp8": {"weight": {"format": "mxfp8", **block(32)}},
    "nvfp4": {"weight": {"format": "nvfp4", **block(16)}},
}

HALF = ("int8-bfloat16", "mxfp4", "mxfp8", "nvfp4")
"""Those that it decompresses to bfloat16: where scales are, and whatever their scales are."""

# One row; a row more than blocks of 128, and half a block of columns more.
SHAPES = {"one": (1, 64), "some": (8, 32), "over": (129, 192)}

every = pytest.mark.parametrize("name", SCHEMES)


def shapes_of(name: str) -> dict[str, tuple[int, int]]:
    """Its package fails on zero points of up to 8 rows and more than one group."""
    return {key: each for key, each in SHAPES.items() if (name, key) != ("int4-zeros", "one")}


class Model(nn.Module):
    """A linear of each shape, and one that stays plain."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        for name, (rows, columns) in shapes.items():
            self.add_module(name, nn.Linear(columns, rows, bias=name == "some"))
        self.head = nn.Linear(16, 4)


def made(name: str, folder: Path) -> tuple[Path, Tensors]:
    """A checkpoint of ours: its folder and its tensors."""
    weights = {
        f"{module}.weight": awkward(*shape, seed)
        for seed, (module, shape) in enumerate(shapes_of(name).items())
    }
    weights |= {"head.weight": torch.ones(4, 16), "head.bias": torch.ones(4)}
    weights["some.bias"] = torch.linspace(-1, 1, shapes_of(name)["some"][0])
    plain = {"modules": ["head"], "dtype": "float32", "reason": "it is small"}
    path, tensors = written(folder, LAYOUT, SCHEMES[name], weights, protected=[plain])
    return path.parent, tensors


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, Tensors]]:
    return {name: made(name, tmp_path_factory.mktemp(name)) for name in SCHEMES}


@pytest.fixture(scope="module")
def peer() -> Any:
    """compressed-tensors."""
    return library("compressed_tensors")


def config_of(folder: Path) -> Json:
    document: Json = json.loads((folder / "config.json").read_text("utf-8"))
    found: Json = document["quantization_config"]
    return found


# What it wrote

WRITTEN = sorted(
    path.name.removeprefix(f"{LAYOUT}-").removesuffix(".config.json")
    for path in GOLDEN.glob(f"{LAYOUT}-*.config.json")
)


@pytest.mark.parametrize("name", WRITTEN)
def test_its_weights_are_read_to_the_bit(name: str, tmp_path: Path) -> None:
    """After the same last cast: its products are float32, or exact in bfloat16."""
    wanted = expected(f"{LAYOUT}-{name}")
    folder = with_config(f"{LAYOUT}-{name}", tmp_path)
    for found in (
        load_state_dict(folder, layout=LAYOUT),
        load_state_dict(folder / "model.safetensors", layout=LAYOUT),
    ):
        for module, weight in wanted.items():
            assert same(found[f"{module}.weight"].to(weight.dtype), weight)
        plain = {key: each for key, each in source().items() if key in found}
        assert same(found["head.weight"], plain["head.weight"])


def test_all_of_its_goldens_are_read() -> None:
    assert len(WRITTEN) == 11


# How it encodes, given its scales


def stored_by_it(name: str, module: str) -> tuple[Tensors, Tensor]:
    """Tensors of a module in a golden file, by their last name, and its source, float32."""
    tensors = load_file(GOLDEN / f"{LAYOUT}-{name}.safetensors")
    mine = {
        key.rpartition(".")[2]: each
        for key, each in tensors.items()
        if key.startswith(f"{module}.")
    }
    return mine, source()[f"{module}.weight"].float()


@pytest.mark.parametrize("module", ["layers.0.attention.o", "layers.0.feed_forward.w1"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4", "nvfp4-activations"])
def test_from_its_scales_our_codes_are_its(name: str, module: str) -> None:
    stored, weight = stored_by_it(name, module)
    spec: ScaledWeight
    if name.startswith("nvfp4"):
        spec = NvFp4(format="nvfp4", granularity="group")
        # Divided by what it stores: ours multiply, which may differ in the last place.
        scale = stored["weight_scale"].float() / stored["weight_global_scale"]
    else:
        spec = {
            "mxfp4": MxFp4(format="mxfp4", granularity="group"),
            "mxfp8": MxFp8(format="mxfp8", granularity="group"),
        }[name]
        scale = stored["weight_scale"].view(torch.float8_e8m0fnu)
    codes = get_format(spec).encode(weight, scale, spec)
    if name == "mxfp8":
        assert same(codes, stored["weight"])
    else:
        assert same(pack(codes, PACKINGS["uint8-low-nibble"]), stored["weight_packed"])


@pytest.mark.parametrize(
    "module",
    ["layers.0.attention.o", "layers.0.feed_forward.w1", "layers.0.feed_forward.w2"],
)
def test_from_its_scales_our_int8_is_its_less_the_code_that_is_never_written(module: str) -> None:
    """Of float32 weights: its scale is ``amax / 127.5``, and it goes to -128."""
    stored, weight = stored_by_it("int8-float32-scale", module)
    spec = Int8Channel(format="int8", granularity="channel")
    codes = get_format(spec).encode(weight, stored["weight_scale"], spec)
    assert same(codes, stored["weight"].clamp(min=-127))
    assert int(stored["weight"].min()) == -128


# What it reads


def only_group(peer: Any, folder: Path) -> tuple[Any, Any]:
    """Its configuration, and the scheme in it that every module has."""
    found = peer.quantization.QuantizationConfig.model_validate(config_of(folder))
    (scheme,) = found.config_groups.values()
    return found, scheme


def decompressed(peer: Any, scheme: Any, tensors: Tensors, module: str) -> Tensor:
    compressor = peer.compressors.BaseCompressor.get_value_from_registry(scheme.format)
    mine = {
        key.removeprefix(f"{module}."): each
        for key, each in tensors.items()
        if key.startswith(f"{module}.weight")
    }
    found: Tensor = compressor.decompress(mine, scheme)["weight"]
    return found


@every
def test_it_decompresses_to_the_same_numbers(name: str, peer: Any, ours: Any) -> None:
    folder, tensors = ours[name]
    _, scheme = only_group(peer, folder)
    found = load_state_dict(folder)
    for module in shapes_of(name):
        theirs, weight = decompressed(peer, scheme, tensors, module), found[f"{module}.weight"]
        if name == "nvfp4":
            # Block scales are divided by one number: two float32 roundings from ours.
            levels = weight_in_levels(folder, module)
            scale = tensors[f"{module}.weight_scale"].float()
            scale = scale / tensors[f"{module}.weight_global_scale"]
            exact = (levels * scale.repeat_interleave(16, 1)).bfloat16()
            assert same(theirs, exact)
            gap = (theirs.double() - weight.double()).abs()
            assert bool((gap <= (2.0**-8 + 2.0**-21) * weight.double().abs()).all())
        else:
            assert same(theirs, weight.to(theirs.dtype))
        assert theirs.dtype == (torch.bfloat16 if name in HALF else torch.float32)


def weight_in_levels(folder: Path, module: str) -> Tensor:
    """What its codes stand for, without scales."""
    with open_checkpoint(folder) as checkpoint:
        stored = checkpoint.module(module)
        assert isinstance(stored.weight, ScaledWeight)
        codes = checkpoint.stored(module).codes(0, stored.out_features)
        return get_format(stored.weight).levels(codes, None, (1, 16))


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (8, 96)])
def test_it_fails_on_zero_points_of_a_few_rows(
    rows: int, columns: int, peer: Any, tmp_path: Path
) -> None:
    """They are one row of int32, which it takes for contiguous when it is turned."""
    path, tensors = written(
        tmp_path, LAYOUT, SCHEMES["int4-zeros"], {"a.weight": awkward(rows, columns)}
    )
    _, scheme = only_group(peer, path.parent)
    with pytest.raises(RuntimeError, match="stride"):
        decompressed(peer, scheme, tensors, "a")


def loaded_by(
    peer: Any, config: Any, shapes: Mapping[str, tuple[int, int]], tensors: Tensors
) -> Model:
    """Our tensors in a model that its configuration was applied to, as it loads its own."""
    model = Model(shapes)
    peer.quantization.apply_quantization_config(model, config)
    compressor = peer.ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.load_state_dict(tensors, assign=True, strict=True)
    compressor.decompress_model(model)
    return model.requires_grad_(False)


@every
def test_a_model_of_it_computes_with_our_codes(name: str, peer: Any, ours: Any) -> None:
    folder, tensors = ours[name]
    if name in HALF:
        tensors = tensors | {"some.bias": tensors["some.bias"].bfloat16()}
    model = loaded_by(peer, only_group(peer, folder)[0], shapes_of(name), tensors)
    found = load_state_dict(folder)
    for module in shapes_of(name):
        layer: Any = model.get_submodule(module)
        weight, bias = layer.weight, layer.bias
        inputs = awkward(6, weight.shape[1], 9).view(2, 3, -1).to(weight.dtype)
        result = layer(inputs)
        dense = found[f"{module}.weight"]
        if name != "nvfp4":
            assert same(weight, dense.to(weight.dtype))
        wanted = nn.functional.linear(inputs, dense.to(weight.dtype), bias)
        if SCHEMES[name].get("activation") is None:
            tolerance = 1e-6 if weight.dtype == torch.float32 else 2.0**-7
            torch.testing.assert_close(result, wanted, rtol=tolerance, atol=tolerance)
            continue
        assert not torch.equal(result, wanted)
        magnitude, size = inputs.abs(), dense.abs()
        if name == "int8":
            # Activations are rounded to steps of ``amax / 127.5``; the largest is cut off at 127.
            step = magnitude.amax(-1, keepdim=True) / 127.5
            error = step / 2 * size.sum(1)
        else:
            least = magnitude.amax(-1, keepdim=True) / 448 * 2.0**-10
            error = torch.maximum(magnitude / 16, least) @ size.T
        slack = 1e-5 * (magnitude @ size.T) + 1e-6
        assert bool(((result - wanted).abs() <= error + slack).all())
    assert same(model.head(torch.ones(1, 16)), torch.full((1, 4), 17.0))


def test_schemes_of_several_formats_are_told_apart(peer: Any, tmp_path: Path) -> None:
    weights = {f"{name}.weight": awkward(*shape) for name, shape in SHAPES.items()}
    weights |= {"head.weight": torch.ones(4, 16), "head.bias": torch.ones(4)}
    weights["some.bias"] = torch.ones(8)
    schemes = {"one": "int8", "some": "int4", "over": "nvfp4"}
    plain = {"modules": ["head"], "dtype": "float32", "reason": "it is small"}
    path, tensors = written(
        tmp_path,
        LAYOUT,
        {},
        weights,
        protected=[plain],
        schemes={name: SCHEMES[name] for name in schemes.values()},
        rules=[{"modules": [key], "scheme": name} for key, name in schemes.items()],
    )
    config = peer.quantization.QuantizationConfig.model_validate(config_of(path.parent))
    assert config.format == "mixed-precision"
    assert len(config.config_groups) == 3
    model = loaded_by(peer, config, SHAPES, tensors)
    for key, weight in load_state_dict(path.parent).items():
        found = model.get_parameter(key)
        assert same(found.data, weight.to(found.dtype)), key


# Through transformers


TRANSFORMERS = {
    "int8": "float32",
    "int8-bfloat16": "bfloat16",
    "fp8-channel": "float32",
    "fp8-block": "float32",
    "int4": "float32",
    "mxfp4": "bfloat16",
    "mxfp8": "bfloat16",
    "nvfp4": "bfloat16",
}
"""The dtype in which it gives the numbers that are stored. It casts scales to that of the model:
float32 scales are exact in float32. What decompresses to bfloat16 goes with that alone."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as transformers saves it."""
    transformers = library("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=192,
        vocab_size=32,
    )
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_opens_it(name: str, peer: Any, llama: Path, tmp_path: Path) -> None:
    transformers = library("transformers")
    document = {
        "kind": "recipe",
        "version": 1,
        "name": "small",
        "source": {"layout": "plain"},
        "schemes": {"all": SCHEMES[name]},
        "rules": [{"modules": ["model.layers.**.*_proj"], "scheme": "all"}],
        "target": {"layout": LAYOUT, "passthrough_dtype": "keep"},
    }
    convert(parse_recipe(json.dumps(document), "test"), llama, tmp_path / "out")
    dtype: torch.dtype = getattr(torch, TRANSFORMERS[name])
    open_model = transformers.AutoModelForCausalLM.from_pretrained
    model = open_model(tmp_path / "out", dtype=dtype).requires_grad_(False)
    tokens = torch.arange(7)[None]
    # It decompresses when it first computes.
    found, dense = model(tokens).logits, load_state_dict(tmp_path / "out")
    for key, weight in dense.items():
        assert same(model.get_parameter(key), weight.to(dtype)), key
    plain = open_model(llama, dtype=dtype)
    plain.load_state_dict(dense, strict=True)
    wanted = plain.requires_grad_(False)(tokens).logits
    if SCHEMES[name].get("activation") is None:
        assert same(found, wanted)
    else:
        assert not torch.equal(found, wanted)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))


def test_transformers_refuses_packed_zero_points_even_its_own(peer: Any, tmp_path: Path) -> None:
    """It expects the shape of unpacked ones, so none of ours can be opened there either."""
    library("transformers")
    name, module = f"{LAYOUT}-int4-zeros", "layers.0.feed_forward.w1"
    kind = transformers_model()
    config = kind.config_class(shapes={module: [16, 256]}, dtype="bfloat16")
    config.save_pretrained(with_config(name, tmp_path))
    document = json.loads((tmp_path / "config.json").read_text("utf-8"))
    document |= json.loads((GOLDEN / f"{name}.config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
