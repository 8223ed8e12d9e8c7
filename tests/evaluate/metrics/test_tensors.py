"""SQNR and cosine of tensors in files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantrecipe.evaluate.metrics import tensors
from quantrecipe.evaluate.metrics.tensors import Cosine, Sqnr
from quantrecipe.schema.problems import InvalidInput

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


@given(st.integers(0, 99), DTYPES, DTYPES)
@settings(max_examples=20)
def test_they_are_those_of_all_numbers_together(
    tmp_path_factory: pytest.TempPathFactory, seed: int, one: torch.dtype, other: torch.dtype
) -> None:
    folder = tmp_path_factory.mktemp("t")
    generator = torch.Generator().manual_seed(seed)
    r = {name: torch.randn(5, 7, generator=generator).to(one) for name in ("a", "b")}
    x = {
        name: (t + 0.1 * torch.randn(5, 7, generator=generator)).to(other) for name, t in r.items()
    }
    paths = folder / "x.safetensors", folder / "r.safetensors"
    save_file(x, paths[0])
    save_file(r, paths[1])
    flat_x, flat_r = (torch.cat([t.flatten().double() for t in d.values()]) for d in (x, r))
    power, noise = flat_r.square().sum(), (flat_x - flat_r).square().sum()
    assert Sqnr().score(*paths) == pytest.approx(10 * math.log10(power / noise))
    expected = torch.nn.functional.cosine_similarity(flat_x, flat_r, dim=0).item()
    assert Cosine().score(*paths) == pytest.approx(expected)


def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, r = tmp_path / "x.safetensors", tmp_path / "r.safetensors"
    save_file({"a": torch.arange(30.0)}, x)
    save_file({"a": torch.arange(30.0) + 1}, r)
    whole = Sqnr().score(x, r), Cosine().score(x, r)
    monkeypatch.setattr(tensors, "_BLOCK_BYTES", 7 * 8)
    assert (Sqnr().score(x, r), Cosine().score(x, r)) == pytest.approx(whole)


def test_the_same_is_as_near_as_it_gets(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.tensor([1.0, -2.0])}, path)
    assert Sqnr().score(path, path) == 200
    assert Cosine().score(path, path) == 1


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        ({"a": torch.ones(3)}, "misshaped-tensor"),
        ({"b": torch.ones(2)}, "missing-tensor"),
        ({"a": torch.ones(2, dtype=torch.int8)}, "wrong-dtype"),
        ({"a": torch.tensor([1.0, float("nan")])}, "not-finite"),
        ({"a": torch.zeros(2)}, "no-signal"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, other: dict[str, torch.Tensor], kind: str) -> None:
    x, r = tmp_path / "x.safetensors", tmp_path / "r.safetensors"
    save_file({"a": torch.ones(2)}, x)
    save_file(other, r)
    for metric in (Sqnr(), Cosine()):
        with pytest.raises(InvalidInput) as caught:
            metric.score(x, r)
        assert [problem.kind for problem in caught.value.problems] == [kind]
