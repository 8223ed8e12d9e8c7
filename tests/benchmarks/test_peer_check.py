from __future__ import annotations

import math
from pathlib import Path

import peer_check
import pytest
import torch
from safetensors.torch import save_file

SHAPE = (48, 32)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def stored(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> peer_check.Tensors:
    path = folder / f"{name}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return peer_check.Tensors([path])


@pytest.fixture(params=["bfloat16", "float8_e4m3fn"])
def source(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    weight = random(*SHAPE)
    others = {"norm.weight": random(SHAPE[1], seed=1), "a.bias": random(SHAPE[0], seed=2)}
    if request.param == "bfloat16":
        return {"a.weight": weight.bfloat16(), **others}
    scale = weight.abs().amax(1) / 448
    codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    return {"a.weight": codes, "a.weight_scale": scale, **others}


def true_weight(source: dict[str, torch.Tensor]) -> torch.Tensor:
    scale = source.get("a.weight_scale", torch.ones(SHAPE[0]))
    return source["a.weight"].float() * scale[:, None]


def others(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in source.items() if not name.startswith("a.weight")}


def outputs(weight: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    codes, scale = quantized(weight)
    return {
        "scaled": {"a.weight": codes, "a.weight_scale": scale},
        "torchao": {
            "a._weight_qdata": codes - 1,
            "a._weight_scale": scale,
            "a._weight_zero_point": torch.full_like(scale, -1, dtype=torch.int8),
        },
        "quanto": {"a.weight._data": codes, "a.weight._scale": scale},
    }


@pytest.mark.parametrize("convention", peer_check.CONVENTIONS)
def test_reads_every_convention(
    tmp_path: Path, source: dict[str, torch.Tensor], convention: str
) -> None:
    weight = true_weight(source)
    written = {**outputs(weight)[convention], **others(source)}
    verdict = peer_check.check(
        stored(tmp_path, "source", source),
        stored(tmp_path, "out", written),
        peer_check.CONVENTIONS[convention],
    )
    codes, scale = quantized(weight)
    expected = float((codes * scale - weight).double().norm() / weight.double().norm())
    assert verdict.worst == verdict.median == pytest.approx(expected, rel=1e-4)
    assert verdict.worst < 0.02
    assert (verdict.modules, verdict.dtypes) == (1, {"int8": 1})
    assert (verdict.missing, verdict.changed) == ([], [])


@pytest.mark.parametrize(
    ("fault", "missing", "changed", "least"),
    [
        pytest.param({"a.weight_scale": None}, [], [], 0.1, id="scale dropped"),
        pytest.param({"a.weight_scale": torch.tensor(math.nan)}, [], [], math.inf, id="scale NaN"),
        pytest.param({"a.weight": None}, ["a.weight"], [], math.nan, id="weight dropped"),
        pytest.param({"norm.weight": None}, ["norm.weight"], [], 0, id="norm dropped"),
        pytest.param({"a.bias": torch.zeros(SHAPE[0])}, [], ["a.bias"], 0, id="bias altered"),
    ],
)
def test_finds_what_is_wrong(
    tmp_path: Path,
    source: dict[str, torch.Tensor],
    fault: dict[str, torch.Tensor | None],
    missing: list[str],
    changed: list[str],
    least: float,
) -> None:
    written = {**outputs(true_weight(source))["scaled"], **others(source), **fault}
    kept = {name: tensor for name, tensor in written.items() if tensor is not None}
    verdict = peer_check.check(
        stored(tmp_path, "source", source),
        stored(tmp_path, "out", kept),
        peer_check.CONVENTIONS["scaled"],
    )
    assert (verdict.missing, verdict.changed) == (missing, changed)
    assert verdict.worst > least or not math.isfinite(verdict.worst)
