"""The quantizer clip-search in conversions: what columns count for, and what is verified."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from quantrecipe.converter import convert
from quantrecipe.evaluate import verify
from quantrecipe.formats import quantize
from quantrecipe.schema.problems import InvalidInput
from quantrecipe.schema.recipe import Recipe
from tests.converter.making import (
    Json,
    everything,
    raw,
    recipe,
    result_of,
    save,
    save_statistics,
    weight_spec,
)
from tests.evaluate.tampering import edit_tensor

SEARCH = {"kind": "clip-search", "steps": 8, "statistics": "moments.safetensors"}
SMOOTHING = {"kind": "smoothquant", "alpha": 0.5, "apply": "online", "statistics": "s.safetensors"}
COLUMNS = 12


def moments(seed: int, bins: int = 2) -> Tensor:
    random = np.random.default_rng(seed)
    values = np.exp2(random.uniform(-12, 12, (bins, COLUMNS)))
    values[:, 5] = 0
    return torch.from_numpy(values)


def write_recipe(folder: Path, scheme: Json) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe(target=everything(), schemes={"all": scheme})))
    return path


def write_statistics(folder: Path, second_moment: Tensor, tokens: list[int] | None) -> Path:
    more = {"model/a/input_second_moment": second_moment}
    if tokens is not None:
        more["model/a/tokens"] = torch.tensor(tokens)
    maxima = {"a": second_moment.sqrt().float()}
    return save_statistics(folder / "moments.safetensors", "model", maxima, more)


@given(
    kind=st.sampled_from(["int8 channel", "int8 group", "float8_e4m3fn block"]),
    seed=st.integers(0, 99),
    tokens=st.none() | st.just([3, 0]) | st.just([1, 7]),
    smooth=st.booleans(),
    size=st.integers(1, 400),
)
@settings(max_examples=6)
def test_columns_count_by_their_inputs(
    kind: str, seed: int, tokens: list[int] | None, smooth: bool, size: int
) -> None:
    """``E[x_j^2] / s_j^2``, where smoothing and search name files of their own."""
    random = np.random.default_rng(seed)
    weight = torch.from_numpy(random.standard_t(3, (7, COLUMNS))).float()
    scheme: Json = {"weight": weight_spec(*kind.split()) | {"quantizer": SEARCH}}
    measured = moments(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = save(folder / "m.safetensors", {"a.weight": weight})
        write_statistics(folder, measured, tokens)
        if smooth:
            scheme["smoothing"] = SMOOTHING
            maxima = torch.from_numpy(random.lognormal(0, 2, (1, COLUMNS))).float()
            save_statistics(folder / "s.safetensors", "model", {"a": maxima})
        path = write_recipe(folder, scheme)
        found = [
            result_of(convert(path, source, folder / by, converter=by, block_bytes=size).out)
            for by in ("reference", "streaming")
        ]
        assert found[0] == found[1]
        assert verify(folder / "streaming", against=source).whole
        stored = load_file(folder / "streaming" / "model.safetensors")
    counts = torch.tensor(tokens or [1, 1], dtype=torch.float64)
    importance = (measured * counts[:, None]).sum(0)
    factors = stored.get("a.smoothing", torch.ones(COLUMNS))
    importance = (importance / importance.max() / factors.double() ** 2).float()
    spec = Recipe.model_validate_json(path_text(scheme)).schemes["all"].weight
    expected = quantize(weight * factors, spec, importance)
    assert expected.scale is not None
    assert raw(stored["a.weight"]) == raw(expected.codes)
    assert raw(stored["a.weight_scale"]) == raw(expected.scale)


def path_text(scheme: Json) -> str:
    return json.dumps(recipe(schemes={"all": scheme}))


@pytest.fixture
def weight() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_t(2, (6, COLUMNS))).float()


@pytest.fixture
def source(tmp_path: Path, weight: Tensor) -> Path:
    return save(tmp_path / "m.safetensors", {"a.weight": weight})


def problems_of(path: Path, source: Path, out: Path) -> list[tuple[str, str | None, str | None]]:
    with pytest.raises(InvalidInput) as refused:
        convert(path, source, out)
    return [(each.kind, each.pointer, each.tensor) for each in refused.value.problems]


@pytest.mark.parametrize(
    ("width", "moments", "kind"),
    [
        (COLUMNS, None, "statistics-mismatch"),
        (COLUMNS - 1, torch.ones(1, COLUMNS - 1, dtype=torch.float64), "statistics-mismatch"),
        (COLUMNS, torch.ones(1, COLUMNS), "bad-statistics"),
    ],
    ids=["absent", "another width", "float32"],
)
def test_second_moments_that_do_not_fit(
    tmp_path: Path, source: Path, width: int, moments: Tensor | None, kind: str
) -> None:
    more = {} if moments is None else {"model/a/input_second_moment": moments}
    save_statistics(tmp_path / "moments.safetensors", "model", {"a": torch.ones(1, width)}, more)
    path = write_recipe(tmp_path, {"weight": weight_spec("int8") | {"quantizer": SEARCH}})
    found = problems_of(path, source, tmp_path / "out")
    assert found == [(kind, None, "model/a/input_second_moment")]


def test_every_file_that_is_missing_is_named(tmp_path: Path, source: Path) -> None:
    scheme = {"weight": weight_spec("int8") | {"quantizer": SEARCH}, "smoothing": SMOOTHING}
    assert problems_of(write_recipe(tmp_path, scheme), source, tmp_path / "out") == [
        ("no-statistics", "/schemes/all/smoothing/statistics", None),
        ("no-statistics", "/schemes/all/weight/quantizer/statistics", None),
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e300])
def test_second_moments_that_are_none(tmp_path: Path, source: Path, value: float) -> None:
    measured = moments(0)
    measured[1, 2] = value
    save_statistics(
        tmp_path / "moments.safetensors",
        "model",
        {"a": torch.ones(2, COLUMNS)},
        {"model/a/input_second_moment": measured},
    )
    path = write_recipe(tmp_path, {"weight": weight_spec("int8") | {"quantizer": SEARCH}})
    with pytest.raises(InvalidInput, match=r"at index \[1, 2\] cannot have been measured"):
        convert(path, source, tmp_path / "out")


def test_a_scale_that_no_clip_ratio_makes_is_noticed(
    tmp_path: Path, source: Path, weight: Tensor
) -> None:
    spec = weight_spec("float8_e4m3fn") | {"quantizer": {"kind": "clip-search"}}
    path = write_recipe(tmp_path, {"weight": spec})
    out = convert(path, source, tmp_path / "out").out
    found = verify(out, against=source)
    assert found.whole
    stored = load_file(out / "model.safetensors")["a.weight_scale"]
    unclipped = weight.abs().amax(1) / 448
    assert bool((stored.flatten() < unclipped).any())

    def shrink(payload: bytearray) -> None:
        payload[:4] = (stored.flatten()[0] * 0.97).numpy().tobytes()

    edit_tensor(out, "a.weight_scale", shrink)
    found = verify(out, against=source)
    (problem,) = [each for each in found.problems if each.kind == "scale-differs"]
    assert problem.message.endswith(", or that times a clip ratio")
