"""Computing on another device: the same bytes, or a clear error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from quantrecipe.converter import check_devices, convert
from quantrecipe.schema.problems import InvalidInput
from tests.converter.making import (
    everything,
    numbers,
    parsed,
    recipe,
    result_of,
    save,
    save_statistics,
    weight_spec,
)
from tests.converter.test_streaming import grid_of_everything

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="needs no CUDA device")


def test_the_cpu_is_always_there() -> None:
    assert check_devices("cpu") == ("cpu",)
    assert check_devices("cpu, cpu") == ("cpu", "cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "mps", "cpu:0"])
def test_what_is_not_known_is_named(name: str) -> None:
    with pytest.raises(InvalidInput) as error:
        check_devices(f"cpu,{name}")
    (problem,) = error.value.problems
    assert problem.kind == "no-device"
    assert repr(name) in problem.message


@needs_none
def test_a_gpu_that_is_not_there_is_named_before_any_work(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", {"a.weight": torch.ones(2, 2)})
    with pytest.raises(InvalidInput, match="'cuda:1': this torch sees no CUDA device"):
        convert(parsed(recipe()), source, tmp_path / "out", device="cuda:1")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@needs_cuda
def test_a_gpu_beyond_the_last_is_named() -> None:
    with pytest.raises(InvalidInput, match="counted from 0"):
        check_devices("cuda:99")


@needs_cuda
@pytest.mark.parametrize("size", [1, 700, 1 << 20])
def test_every_kind_to_every_format_gives_the_bytes_of_the_cpu(tmp_path: Path, size: int) -> None:
    source, document = grid_of_everything(tmp_path, (4, 8))
    made = parsed(document)
    expected = result_of(convert(made, source, tmp_path / "cpu", converter="reference").out)
    for device in ("cuda", "cuda:0,cuda:0", "cpu,cuda:0"):
        out = tmp_path / device.replace(":", "-")
        found = convert(made, source, out, device=device, block_bytes=size, jobs=3).out
        assert result_of(found) == expected, device


@needs_cuda
@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_wide_and_awkward_weights_give_the_bytes_of_the_cpu(
    tmp_path: Path, fmt: str, granularity: str
) -> None:
    rng = np.random.default_rng(3)
    ties = torch.from_numpy(rng.integers(-254, 255, (40, 3000)) / np.float32(2))
    tensors = {
        "a.weight": numbers(rng, 60, 5001).float(),
        "b.weight": (torch.randn(50, 2048) * 1e-41).float(),
        "c.weight": torch.randn(50, 2048).clamp(-3, 3) * 1e38,
        "d.weight": ties.float(),
        "e.weight": numbers(rng, 300, 4096).bfloat16(),
    }
    source = save(tmp_path / "m.safetensors", tensors)
    statistics = {name[0]: torch.rand(2, one.shape[1]) * 9 for name, one in tensors.items()}
    save_statistics(tmp_path / "s.safetensors", "model", statistics)
    smoothing = {"kind": "smoothquant", "alpha": 0.5, "apply": "online"}
    quantizer = {} if granularity == "tensor" else {"quantizer": {"kind": "clip-search"}}
    schemes = {
        "all": {"weight": weight_spec(fmt, granularity)},
        "smooth": {
            "weight": weight_spec(fmt, granularity) | quantizer,
            "smoothing": {**smoothing, "statistics": "s.safetensors"},
        },
    }
    rules = [{"modules": ["{a,e}"], "scheme": "smooth"}, {"modules": ["*"], "scheme": "all"}]
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(target=everything(), schemes=schemes, rules=rules)))
    expected = result_of(convert(path, source, tmp_path / "cpu").out)
    assert result_of(convert(path, source, tmp_path / "gpu", device="cuda").out) == expected


BLOCKS: dict[str, tuple[str, dict[str, object]]] = {
    "nf4": ("quantrecipe", {"granularity": "block", "block_size": 64}),
    "nested nf4": ("quantrecipe", {"granularity": "block", "block_size": 64}),
    "int4": ("quantrecipe", {"granularity": "group", "group_size": 64, "symmetric": False}),
    "llm_int8": ("bitsandbytes", {"granularity": "channel"}),
    "mxfp8": ("comfyui", {"granularity": "group"}),
    "mxfp4": ("compressed-tensors", {"granularity": "group"}),
    "nvfp4": ("comfyui", {"granularity": "group"}),
    **{name: ("gguf", {"granularity": "block"}) for name in ("q8_0", "q4_0", "q4_k", "q6_k")},
}


@needs_cuda
@pytest.mark.parametrize("name", BLOCKS)
def test_formats_by_block_give_the_bytes_of_the_cpu(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(5)
    layout, fields = BLOCKS[name]
    fmt = name.removeprefix("nested ")
    weight: dict[str, object] = {"format": fmt, **fields}
    if name.startswith("nested"):
        weight["double_quantized"] = True
    tensors = {
        "a.weight": numbers(rng, 256, 1024).float(),
        "b.weight": numbers(rng, 64, 512).bfloat16(),
    }
    source = save(tmp_path / "m.safetensors", tensors)
    file = "model.gguf" if layout == "gguf" else "model.safetensors"
    made = parsed(recipe(weight, target=layout, target_fields={"file": file}))
    expected = result_of(convert(made, source, tmp_path / "cpu").out)
    assert result_of(convert(made, source, tmp_path / "gpu", device="cuda").out) == expected


@needs_cuda
def test_a_number_that_is_none_is_named_as_on_the_cpu(tmp_path: Path) -> None:
    weight = torch.ones(9, 8)
    weight[7, 5] = float("nan")
    source = save(tmp_path / "m.safetensors", {"b.weight": weight})
    with pytest.raises(InvalidInput, match=r"at index \[7, 5\]"):
        convert(parsed(recipe()), source, tmp_path / "out", device="cuda", block_bytes=64)
