from __future__ import annotations

import hashlib
import math
from pathlib import Path

import ideogram4_source as source
import pytest
import torch
from safetensors import safe_open

SMALL = source.Dimensions.scaled(0.01, layers=2)


def test_full_scale_has_the_published_size() -> None:
    dimensions = source.Dimensions.scaled(1.0)
    tensors = source.branch_tensors(dimensions)
    assert source.branch_bytes(dimensions) == 9_289_792_888
    assert len(tensors) == 669
    assert sum(tensor.dtype == "float8_e4m3fn" for tensor in tensors) == 211
    numbers = sum(math.prod(t.shape) for t in tensors if not t.name.endswith("weight_scale"))
    assert numbers == 9_279_288_448


@pytest.mark.parametrize("dtype", source.DTYPES)
def test_writes_what_it_planned(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "transformer" / source.FILE_NAME
    size = source.write_branch(path, SMALL, seed=3, dtype=dtype)
    assert size == path.stat().st_size == source.branch_bytes(SMALL, dtype)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for tensor in source.branch_tensors(SMALL, dtype):
            stored = file.get_tensor(tensor.name)
            assert tuple(stored.shape) == tensor.shape
            assert str(stored.dtype) == f"torch.{tensor.dtype}"
            assert torch.isfinite(stored.float()).all(), tensor.name
            if tensor.dtype == "float32":
                assert (stored > 0).all(), tensor.name


def test_bfloat16_has_the_same_names_and_shapes_without_scales(tmp_path: Path) -> None:
    fp8 = {tensor.name: tensor for tensor in source.branch_tensors(SMALL)}
    plain = {tensor.name: tensor for tensor in source.branch_tensors(SMALL, "bfloat16")}
    assert set(fp8) - set(plain) == {name for name in fp8 if name.endswith(".weight_scale")}
    assert set(plain) <= set(fp8)
    assert all(tensor.shape == fp8[name].shape for name, tensor in plain.items())
    assert {tensor.dtype for tensor in plain.values()} == {"bfloat16"}

    path = tmp_path / source.FILE_NAME
    source.write_branch(path, SMALL, seed=3, dtype="bfloat16")
    with safe_open(path, "pt") as file:
        weight = file.get_tensor("layers.0.feed_forward.w1.weight").float()
    assert 0.019 < float(weight.std()) < 0.021
    assert len(weight.unique()) > 1000


@pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False)])
def test_numbers_follow_from_the_seed(tmp_path: Path, seed: int, same: bool) -> None:
    digests = []
    for number, used in enumerate((0, seed)):
        path = tmp_path / f"{number}.safetensors"
        source.write_branch(path, SMALL, seed=used)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert (digests[0] == digests[1]) is same
