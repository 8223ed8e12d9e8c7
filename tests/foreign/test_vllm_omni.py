"""vllm-omni and LightX2V int8: bytes on disk and the rules that their readers state.

Neither is a package that a CPU can install, so what is compared is what they ask for: ``weight``
int8 ``[out, in]``, ``weight_scale`` float32 ``[out, 1]``, and a ``quantization_config`` that lists
what is left out.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantrecipe.loaders import load_state_dict
from quantrecipe.schema.problems import InvalidInput
from tests.support.goldens import GOLDEN, Json, awkward, expected, same, source, written

SCHEME: Json = {"weight": {"format": "int8", "granularity": "channel"}}
SHAPES = {"one": (1, 64), "square": (32, 32), "over": (129, 65)}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    weights = {
        f"{module}.weight": awkward(*shape, seed)
        for seed, (module, shape) in enumerate(SHAPES.items())
    }
    weights |= {"square.bias": torch.linspace(-1, 1, 32), "head.weight": torch.ones(4, 16)}
    weights["norm.weight"] = torch.ones(4)
    kept = {"modules": ["head"], "dtype": "bfloat16", "reason": "it is small"}
    path, _ = written(
        tmp_path_factory.mktemp("omni"), "vllm-omni", SCHEME, weights, protected=[kept]
    )
    return path, weights


def test_the_config_says_what_they_ask_for(ours: tuple[Path, dict[str, Tensor]]) -> None:
    document = json.loads((ours[0].parent / "config.json").read_text("utf-8"))
    assert document["quantization_config"] == {
        "quant_method": "int8",
        "activation_scheme": "dynamic",
        "ignored_layers": ["head"],
    }


def test_tensors_are_what_they_ask_for(ours: tuple[Path, dict[str, Tensor]]) -> None:
    """And nothing else: a tensor that a model has no place for fails there."""
    path, weights = ours
    tensors, wanted = load_file(path), dict[str, tuple[torch.dtype, tuple[int, ...]]]()
    for module, shape in SHAPES.items():
        wanted[f"{module}.weight"] = torch.int8, shape
        # [out] would be taken for a scale of every column of a square weight.
        wanted[f"{module}.weight_scale"] = torch.float32, (shape[0], 1)
    wanted |= {
        "square.bias": (torch.float32, (32,)),
        "head.weight": (torch.bfloat16, (4, 16)),
        "norm.weight": (torch.float32, (4,)),
    }
    assert {key: (each.dtype, tuple(each.shape)) for key, each in tensors.items()} == wanted
    assert same(tensors["square.bias"], weights["square.bias"])


def test_codes_times_scales_are_the_weights(ours: tuple[Path, dict[str, Tensor]]) -> None:
    """``float32(weight) * weight_scale``, and codes that a symmetric int8 product may have."""
    path, weights = ours
    tensors, found = load_file(path), load_state_dict(path)
    for module in SHAPES:
        codes, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
        weight = weights[f"{module}.weight"]
        assert same(found[f"{module}.weight"], codes.float() * scale)
        amax = weight.abs().amax(1, keepdim=True)
        assert same(scale, torch.where(amax == 0, 1.0, amax / 127))
        assert same(codes, (weight / scale).round().clamp(-127, 127).to(torch.int8))


def test_checkpoints_of_this_shape_are_read(tmp_path: Path) -> None:
    """compressed-tensors' int8 with float32 scales has the same tensors; nothing else is asked."""
    name = "compressed-tensors-int8-float32-scale"
    found = load_state_dict(GOLDEN / f"{name}.safetensors", layout="vllm-omni")
    for module, weight in expected(name).items():
        assert same(found[f"{module}.weight"], weight)
    assert same(found["head.weight"], source()["head.weight"])
    # Its other int8 file has scales in bfloat16, which these readers do not declare.
    with pytest.raises(InvalidInput, match="scale of dtype bfloat16, expected float32"):
        load_state_dict(GOLDEN / "compressed-tensors-int8.safetensors", layout="vllm-omni")


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"weight": {"format": "int8", "granularity": "tensor"}}, "granularity|tensor"),
        ({"weight": {"format": "float8_e4m3fn", "granularity": "channel"}}, "no place for"),
        (SCHEME | {"rotation": {"kind": "hadamard", "size": 16}}, "rotat"),
    ],
)
def test_what_they_would_not_be_told_is_refused(scheme: Json, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        written(tmp_path, "vllm-omni", scheme, {"a.weight": awkward(16, 64)})
    assert not (tmp_path / "out").exists()
